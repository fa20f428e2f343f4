"""python -m kernels.compile: every kernel compiles for bf16 without a GPU, and the report says where one is too big."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import compile as compiler
from kernels.launches import LAUNCHES

ROOT = Path(__file__).parents[2]


def test_every_kernel_compiles_within_its_card(tmp_path: Path) -> None:
    """In the environment of the tests: the command itself leaves the interpreter."""
    report = tmp_path / "report.json"
    program = [sys.executable, "-m", "kernels.compile", "--arch", "80,86,90", "--json", str(report)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(report.read_text())
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (name, arch) for name in LAUNCHES for arch in (80, 86, 90)
    }
    assert all(row["registers"] > 0 for row in rows)


def test_a_card_or_op_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, accepted in ((["--arch", "80,42"], "80, 86, 89, 90, 120"), (["--only", "dance"], "rms_norm")):
        with pytest.raises(SystemExit, match="2"):
            compiler.options(argv)
        assert accepted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "arch", "spills", "shared", "code", "problem"),
    [
        ("norm_forward", 86, 0, 99 * 1024, "float", ""),
        ("norm_forward", 86, 0, 99 * 1024 + 1, "float", "over the 99 KiB"),
        ("norm_forward", 80, 0, 163 * 1024, "float", ""),
        ("norm_forward", 80, 8, 0, "float", "spills"),
        ("norm_mma_dadapter", 80, 8, 0, "float", ""),
        ("norm_forward", 90, 0, 0, "call @__nv_erff", "libdevice"),
        ("norm_forward", 90, 0, 0, "br label %__nv_exp2f.exit", ""),
        ("norm_forward", 90, 0, 0, "fmul double", "fp64"),
    ],
)
def test_what_is_a_problem(kernel: str, arch: int, spills: int, shared: int, code: str, problem: str) -> None:
    found = compiler.problem_of(kernel, arch, spills, shared, code)
    assert problem in found
    assert bool(found) == bool(problem)
