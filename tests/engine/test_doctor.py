"""doctor.py: what works is said, what does not is a problem and exit code 4."""

from __future__ import annotations

import errno
import importlib.machinery
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import doctor
from csrc import build
from engine import doctor as engine_doctor
from engine import op_checks
from engine.op_checks import OpCheck, check_ops
from kernels import dequantize_nf4, dispatch, library

REPOSITORY = Path(__file__).parents[2]
# files of kernels/ without an op of their own
NO_OPS = {
    "attention_peers",
    "compile",
    "counting",
    "dispatch",
    "dropout",
    "launches",
    "logarithm",
    "traffic",
    "__init__",
}
NO_OPS |= {"norm_mma_parameter", "norm_mma_tiles", "router", "library"}
NO_OPS |= {"frozen_linear", "unpacked", "nf4_bitsandbytes"}

Look = Callable[[], "tuple[int, dict[str, Any]]"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which no kernel has run."""
    monkeypatch.setattr(dispatch, "_settings", {})
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(engine_doctor, "PROBE_BYTES", 2**16)


@pytest.fixture
def look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Look:
    """Types `doctor.py --json`; returns the exit code and what was printed."""

    def type_it() -> tuple[int, dict[str, Any]]:
        code = doctor.main(["--json", "--output_dir", str(tmp_path / "not" / "there")])
        return code, json.loads(capsys.readouterr().out)

    return type_it


def finding(report: dict[str, Any], name: str) -> dict[str, str]:
    found: dict[str, str] = next(entry for entry in report["findings"] if entry["name"] == name)
    return found


def check_of(op: str, dtype: torch.dtype = torch.float32) -> OpCheck:
    return next(check for check in check_ops(torch.device("cpu"), dtype) if check.op == op)


def test_this_machine_works_and_nothing_is_left_behind(look: Look, tmp_path: Path) -> None:
    code, report = look()
    assert (code, report["problems"]) == (0, [])
    assert all(op["ok"] and op["forward"] <= op["allowed"] for op in report["ops"])
    assert list(tmp_path.iterdir()) == []


def test_the_text_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--output_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "everything here works"
    assert any(line.split()[:2] == ["ok", "python"] for line in lines)
    assert any(line.split()[:3] == ["ok", "attention", "reference"] for line in lines) or torch.cuda.is_available()
    columns = {line.index(line.split()[1]) for line in lines if line.startswith("  ok ")}
    assert len(columns) == 1


def test_the_command_works_from_anywhere(tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "doctor.py"), "--json"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "runs") in finding(json.loads(done.stdout), "runs")["text"]


def test_a_wrong_flag_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--jsn"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_op_is_checked_forward_and_backward(dtype: torch.dtype) -> None:
    checks = check_ops(torch.device("cpu"), dtype)
    files = {path.stem.removesuffix("_kernels") for path in (REPOSITORY / "kernels").glob("*.py")} - NO_OPS
    assert {stem for stem in files if not any(stem in check.op for check in checks)} == set()
    one_way = {check.op for check in checks if check.backward is None}
    one_way_ops = {"adamw", "decode_attention", "quantize_nf4", "dequantize_nf4", "quantize_int8", "dequantize_int8"}
    assert one_way == one_way_ops | {"decode_attention in a window"}
    assert [check for check in checks if not check.ok] == []


def test_the_backend_and_its_reason_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_KERNELS", "reference")
    check = check_of("norm_mma, RMSNorm")
    assert (check.backend, check.why) == ("reference", "chosen explicitly")
    assert check_of("quantize_nf4").backend == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton was imported without its interpreter")
def test_triton_kernels_are_checked_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIBBLE_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops, every = ("rms_norm", "norm_mma, RMSNorm", "norm_mma, LayerNorm", "projector_mlp"), op_checks.cases
    few = lambda *args: (case for case in every(*args) if case.name in ops)  # noqa: E731
    monkeypatch.setattr(op_checks, "cases", few)  # each takes the interpreter its time, and tests/kernels has them all
    checks = {check.op: check for check in check_ops(torch.device("cpu"), torch.float32)}
    for op in ops:
        assert (checks[op].backend, checks[op].ok) == ("triton", True)
    assert checks["rms_norm"].why == "TRITON_INTERPRET=1"


def test_which_kernels_unpack_weights_is_said(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "found", lambda: None)
    monkeypatch.setattr(library, "missing", lambda: "it was built from other sources: make")
    missing = finding(look()[1], "4-bit kernels")
    assert (missing["status"], missing["text"]) == (
        "note",
        "a CPU does without; it was built from other sources: make",
    )
    about = build.Built("0", (80, 90), 90, "CUDA 12.8")
    monkeypatch.setattr(library, "found", lambda: (tmp_path / "libnibble.so", about))
    there = finding(look()[1], "4-bit kernels")
    assert (there["status"], there["text"]) == ("ok", f"{tmp_path}/libnibble.so (CUDA 12.8, sm_80 sm_90)")


@pytest.mark.parametrize(
    ("unpacks", "missing", "status", "text"),
    [
        ("cuda", "", "ok", "libnibble.so (CUDA 12.8, sm_80) for 4-bit weights on cuda:0"),
        (
            "bitsandbytes",
            "not built: make",
            "note",
            "bitsandbytes' CUDA kernels for 4-bit weights on cuda:0: not built",
        ),
        ("", "not built: make", "problem", "nothing unpacks 4-bit weights on cuda:0"),
    ],
)
def test_what_unpacks_weights_on_a_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, unpacks: str, missing: str, status: str, text: str
) -> None:
    def backend_of(_: Tensor) -> str:
        if not unpacks:
            raise dispatch.BackendError("install bitsandbytes")
        return unpacks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(library, "found", lambda: (Path("libnibble.so"), build.Built("0", (80,), 80, "CUDA 12.8")))
    monkeypatch.setattr(library, "available_for", lambda _: missing)
    monkeypatch.setattr(dequantize_nf4, "backend_of", backend_of)
    (found,) = engine_doctor.packed_weights()
    assert (found.status, found.text.startswith(text)) == (status, True)
    assert found.do == ("" if unpacks else "install bitsandbytes")


def wrong_value(gate: Tensor, up: Tensor) -> Tensor:
    return 1.001 * F.silu(gate) * up


def wrong_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.detach() + 0 * gate) * up


def not_a_number(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up * float("nan")


@pytest.mark.parametrize("broken", [wrong_value, wrong_gradient, not_a_number])
def test_a_wrong_kernel_is_a_problem(
    look: Look, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(op_checks, "swiglu", broken)
    code, report = look()
    assert (code, report["problems"]) == (4, ["swiglu"])


def test_what_an_op_raises_is_its_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available\nmore of it")

    monkeypatch.setattr(op_checks, "varlen_attention", fails)
    assert doctor.main(["--output_dir", str(tmp_path)]) == 4
    printed = capsys.readouterr().out
    assert "RuntimeError: no kernel image is available\n" in printed
    assert printed.splitlines()[-1] == "problems: attention, attention in a window, bidirectional attention"


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [
        (None, "problem", "missing, 2.13.0 is pinned"),
        ("2.9.1+cu128", "problem", "2.9.1+cu128, nibble needs 2.11 or newer"),
        ("2.11.0", "note", "2.11.0, tested with 2.13.0"),
        ("2.13.0+cu130", "ok", "2.13.0+cu130"),
    ],
)
def test_versions(look: Look, monkeypatch: pytest.MonkeyPatch, version: str | None, status: str, text: str) -> None:
    real = engine_doctor._version
    monkeypatch.setattr(engine_doctor, "_version", lambda name: version if name == "torch" else real(name))
    code, report = look()
    found = finding(report, "torch")
    assert (found["status"], found["text"]) == (status, text)
    assert code == (4 if status == "problem" else 0)
    assert bool(report["ops"]) == (status != "problem")


def test_a_package_that_cannot_be_imported_is_said(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    code, report = look()
    assert code == 4 and report["problems"] == ["triton"] and report["ops"] == []
    assert "cannot be imported" in finding(report, "triton")["text"]


def test_a_python_that_is_too_new_is_a_problem(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_doctor, "PYTHON", ((3, 8), (3, 9)))
    code, report = look()
    assert (code, report["problems"]) == (4, ["python"])
    assert "nibble needs 3.8 to 3.9" in finding(report, "python")["text"]


def test_a_full_disk_is_a_problem(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    code, report = look()
    found = finding(report, "runs")
    assert (code, report["problems"]) == (4, ["runs"])
    assert found["text"] == f"{tmp_path} cannot be written: No space left on device"


def test_where_the_demo_is_kept(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path))
    assert "empty" in finding(look()[1], "demo cache")["text"]
    (tmp_path / "demo-data-0123").mkdir()
    assert finding(look()[1], "demo cache")["text"] == f"{tmp_path}: demo-data-0123"


def test_what_is_kept_of_quantized_weights(look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path))
    assert "empty" in finding(look()[1], "weight cache")["text"]
    kept = tmp_path / "weights" / "0123456789abcdef"
    kept.mkdir(parents=True)
    with (kept / "weights.safetensors").open("wb") as file:
        file.truncate(3 << 29)
    (kept / "manifest.json").write_text("{}")
    text = finding(look()[1], "weight cache")["text"]
    assert text.startswith(f"{tmp_path / 'weights'}: 1.50 GiB (0123456789abcdef 1.50 GiB)")
    left = tmp_path / "weights" / ".tmp-0123-45"
    left.mkdir()
    with (left / "weights.safetensors").open("wb") as file:
        file.truncate(1 << 29)
    text = finding(look()[1], "weight cache")["text"]
    assert "2.00 GiB (0123456789abcdef 1.50 GiB)" in text and "0.50 GiB are unfinished" in text


def test_a_cache_that_may_not_be_entered_is_a_finding(
    look: Look, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name that is too long is refused as a closed folder is, also for root."""
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / ("n" * 300)))
    found = finding(look()[1], "weight cache")
    assert found["status"] == "note" and "cannot be read" in found["text"]


def test_another_package_called_kernels_is_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"kernels": ["kernels"]})
    code, report = look()
    found = finding(report, "kernels")
    assert (code, found["status"]) == (0, "note")
    assert "pip uninstall kernels" in found["do"]


def test_a_package_that_hides_ours_is_a_problem(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_doctor.importlib.util.find_spec
    elsewhere = importlib.machinery.ModuleSpec("kernels", None, origin="/site-packages/kernels/__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: elsewhere if name == "kernels" else real(name))
    code, report = look()
    assert (code, report["problems"]) == (4, ["kernels"])
    assert finding(report, "kernels")["text"] == "is taken from /site-packages/kernels"
