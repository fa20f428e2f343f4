# Everything runs in .venv from pinned versions; a second call installs nothing again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: csrc demo test test-all lint compile-all sanitize benchmarks verify-real clean

# The CUDA kernels for 4-bit and 8-bit weights, where nvcc is; elsewhere one line says what does without them.
csrc: $(VENV)/.runtime
	@$(BIN)/python -m csrc.build --optional

# Train the embedded demo in 4 bits, evaluate it, then ask it about a picture that it has not seen.
demo: $(VENV)/.runtime
	@$(BIN)/python -m csrc.build --optional || echo "csrc did not compile; the demo goes on without it"
	$(BIN)/torchrun train.py --bits 4bit
	$(BIN)/python -m scripts.demo_answer --run runs/demo

# A file's tests stay in one process, so that its fixtures are made once; the files with the longest come early.
# Plain `pytest` runs them all in one process, and so does WORKERS=0.
WORKERS ?= 2
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# With the long sweeps too: every language model with every tower and every way to train.
test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "sweep or not sweep"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compile every kernel for every card, dtype and width without a GPU; fails on a spill or too much shared memory.
compile-all: $(VENV)/.runtime
	$(BIN)/python -m kernels.compile --all --arch 80,86,89,90,120

# csrc's kernels under compute-sanitizer; needs a CUDA GPU and the CUDA toolkit. Each tensor is an allocation of its own,
# so that the bounds are its own too; CUDA graphs cannot be captured so. initcheck watches torch's kernels as well: they
# write what ours read.
CSRC_TESTS := $(addprefix tests/kernels/test_,dequantize_nf4.py few_rows.py linear_nf4.py int8.py) \
	tests/csrc/test_dequantize.py tests/csrc/test_linear.py
sanitize: csrc $(VENV)/.dev
	for tool in "memcheck --kernel-name kns=nibble" "racecheck --kernel-name kns=nibble" \
			"synccheck --kernel-name kns=nibble" initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest -q -k "not graph" $(CSRC_TESTS) || exit 1; done

# GPU tests, then every benchmark, then benchmarks/README.md; needs a CUDA GPU.
benchmarks: $(VENV)/.dev
	$(BIN)/python -m benchmarks.suite; code=$$?; \
		test $$code -eq 4 || $(BIN)/python -m benchmarks.report || code=1; exit $$code

# Score a published adapter on the real weights and compare with its published figure:
# make verify-real ARGS="--model 7b-lite --llama_model_path W/ --data_root D/ --adapter_path A.pth"
verify-real: $(VENV)/.runtime
	$(BIN)/python -m scripts.verify_real $(ARGS)

$(VENV)/.runtime: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "nibble needs Python 3.11 to 3.13, $(PYTHON) is another: make PYTHON=python3.12" >&2; exit 4; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(INSTALL) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
