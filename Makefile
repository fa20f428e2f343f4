# Everything runs in .venv from pinned versions; a second call installs nothing again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint compile-all benchmarks verify-real clean

# Train the embedded demo in 4 bits, evaluate it, then ask it about a picture that it has not seen.
demo: $(VENV)/.runtime
	$(BIN)/torchrun train.py --bits 4bit
	$(BIN)/python -m scripts.demo_answer --run runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compile every kernel for every card, dtype and width without a GPU; fails on a spill or too much shared memory.
compile-all: $(VENV)/.runtime
	$(BIN)/python -m kernels.compile --all --arch 80,86,89,90,120

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
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
