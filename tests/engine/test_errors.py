from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import errors
from kernels import dequantize_nf4, dispatch, library


def test_message_has_its_four_parts_and_leaves_out_empty_ones() -> None:
    error = errors.DataError("row 3 has no image: 'a.png'", where="my.json, row 3", do="pass --image_folder")
    assert str(error) == (
        "error[data]: row 3 has no image: 'a.png'\n  where: my.json, row 3\n  do: pass --image_folder"
    )


def test_exit_codes_are_the_promised_ones() -> None:
    names = ("UsageError", "DataError", "EnvironmentProblem", "OutOfMemory", "NotFinite", "CheckpointError", "Stopped")
    assert [getattr(errors, name).exit_code for name in names] == [2, 3, 4, 5, 6, 7, 75]


def test_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(errors.DataError("what", where="here", why="because", do="this")))
    assert str(error) == "error[data]: what\n  where: here\n  why: because\n  do: this"


def raiser(error: BaseException):  # type: ignore[no-untyped-def]
    def main(argv: list[str]) -> int:
        raise error

    return main


class WeightsError(ValueError):
    """Stands for models.weights.errors.WeightsError, which is recognised by its name."""


class MissingTensors(WeightsError):
    pass


class OutOfMemoryError(RuntimeError):
    """Stands for torch.cuda.OutOfMemoryError."""


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (errors.UsageError("bad"), 2, "usage"),
        (WeightsError("bad"), 7, "checkpoint"),
        (MissingTensors("bad"), 7, "checkpoint"),
    ],
)
def test_known_error_prints_its_message_and_no_traceback(
    error: Exception, code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run_command(raiser(error), []) == code
    assert capsys.readouterr().err == f"error[{kind}]: bad\n"


def raised_by(allocate: Callable[[], object]) -> Exception:
    """What a library raises for more than a machine can address."""
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    return caught.value


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory"),
        (MemoryError, "out of memory"),
        (lambda: raised_by(lambda: np.empty(10**17)), "Unable to allocate"),
        (lambda: raised_by(lambda: torch.empty(10**15)), "DefaultCPUAllocator"),
    ],
)
def test_out_of_memory_says_what_needs_less(
    make: Callable[[], Exception], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run_command(raiser(make()), []) == 5
    first, do = capsys.readouterr().err.splitlines()
    assert first.startswith("error[memory]: ") and what in first
    assert do.startswith("  do: lower --runtime.tokens_per_batch") and "--gradient_checkpointing" in do


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory\nCompile with", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_allocations_that_fail_below_torchs_allocator(text: str) -> None:
    found = errors.as_nibble_error(RuntimeError(text))
    assert isinstance(found, errors.OutOfMemory) and errors.is_of_a_gpu(RuntimeError(text))
    assert errors.is_of_a_gpu(OutOfMemoryError("x")) and not errors.is_of_a_gpu(MemoryError())
    assert isinstance(errors.as_nibble_error(OSError(errno.ENOMEM, "Cannot allocate memory")), errors.OutOfMemory)


def test_another_runtime_error_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        errors.run_command(raiser(RuntimeError("a defect of the allocator")), [])


def test_a_backend_that_cannot_run_is_a_matter_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "_settings", {"backend": "triton"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def main(argv: list[str]) -> int:
        dispatch.choose("op", torch.zeros(1), ("triton", "reference"))
        return 0

    assert errors.run_command(main, []) == 4
    told = capsys.readouterr().err
    assert told.startswith(
        "error[environment]: op: backend 'triton' was chosen and cannot run (torch.float32 tensor on "
    )
    assert "do: --runtime.kernels auto" in told


def test_what_must_be_installed_is_said_and_not_to_let_nibble_choose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4-bit weights on a GPU, with neither csrc nor bitsandbytes; here a stand-in for a tensor there."""
    monkeypatch.setattr(dispatch, "_settings", {"backend": "auto"})
    monkeypatch.setattr(library, "available_for", lambda _: "csrc is not built")
    monkeypatch.setattr(dequantize_nf4, "_bitsandbytes", lambda: None)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))

    def main(argv: list[str]) -> int:
        dequantize_nf4.backend_of(x)
        return 0

    assert errors.run_command(main, []) == 4
    told = capsys.readouterr().err
    assert told.startswith("error[environment]: dequantize_nf4: csrc is not built; bitsandbytes with CUDA is missing; ")
    assert "build csrc (make, with nvcc) or install bitsandbytes" in told and "auto" not in told


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run_command(raiser(errors.UsageError("bad")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unknown_error_is_raised() -> None:
    with pytest.raises(ValueError, match="a defect"):
        errors.run_command(raiser(ValueError("a defect")), [])


def test_interrupt_ends_with_the_code_of_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run_command(raiser(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_code_of_main_is_passed_on_and_none_means_success() -> None:
    assert errors.run_command(lambda argv: 3, []) == 3
    assert errors.run_command(lambda argv: None, []) == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    """`train.py --help | head -1`."""
    line = [sys.executable, str(Path(__file__).parents[2] / "train.py"), "--help"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
