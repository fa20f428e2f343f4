"""python -m kernels.compile: every kernel compiles for bf16 without a GPU, and the report says where one is too big.

csrc's too, where nvcc is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build
from kernels import compile as compiler
from kernels.launches import LAUNCHES

ROOT = Path(__file__).parents[2]
ARCHS = (80, 86, 90)
IN_CSRC = {
    name
    for path in (ROOT / "csrc").glob("*.cu*")
    for name in re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(", path.read_text())
}


def test_every_kernel_compiles_within_its_card(tmp_path: Path) -> None:
    """In the environment of the tests: the command itself leaves the interpreter."""
    report = tmp_path / "report.json"
    program = [sys.executable, "-m", "kernels.compile", "--arch", "80,86,90", "--json", str(report)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(report.read_text())
    names = {*LAUNCHES, *(IN_CSRC if build.find_nvcc() else ())}
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in names for arch in ARCHS}
    assert all(row["registers"] > 0 for row in rows)


@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_a_spill_in_csrc_is_found(tmp_path: Path) -> None:
    """In a kernel of 300 values a thread, where 64 registers are allowed."""
    (tmp_path / "wasteful.cu").write_text("""
        namespace nibble { namespace { struct fp16 {};
        template <class T, int N> __global__ void __launch_bounds__(1024) wasteful(float* x) {
            float v[N];
            for (int i = 0; i < N; ++i) v[i] = x[i * 1024 + threadIdx.x];
            __syncthreads();
            for (int i = 0; i < N; ++i) x[(i * 7 % N) * 1024 + threadIdx.x] = v[i] * v[N - 1 - i];
        }
        template __global__ void wasteful<fp16, 300>(float*); } }""")
    library = build.build(tmp_path / "lib.so", [80, 90], folder=tmp_path)
    (row,) = compiler.csrc_kernels(library, (90,))
    assert (row.kernel, row.call, row.dtype, row.arch) == ("wasteful", "csrc, 300", "float16", 90)
    assert row.spills > 0 and row.problem == "spills, though bound by memory"


def test_without_nvcc_the_report_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(**_: object) -> Path:
        raise build.NoCompilerError("nvcc is not here")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(build, "build", missing)
    assert compiler.main(["--only", "csrc"]) == 0
    assert "csrc was not compiled: nvcc is not here" in capsys.readouterr().out


def test_csrc_that_does_not_compile_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> Path:
        raise build.BuildError("nvcc few_rows.cu ended with 2:\nno such function")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(build, "build", fails)
    assert compiler.main(["--only", "csrc"]) == 1
    assert "no such function" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("signature", "plain"),
    [
        ("void nibble::linear<nibble::bf16, 8, true>(nibble::Parts)", ("linear", ", 8, true", "bfloat16")),
        ("nibble::(anonymous namespace)::add_splits(float const*, long)", ("add_splits", "", "any")),
    ],
)
def test_kernels_of_csrc_have_plain_names(signature: str, plain: tuple[str, str, str]) -> None:
    assert compiler.plain_name(signature) == plain


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
        ("few_rows", 80, 8, 0, "", "spills"),
    ],
)
def test_what_is_a_problem(kernel: str, arch: int, spills: int, shared: int, code: str, problem: str) -> None:
    found = compiler.problem_of(kernel, arch, spills, shared, code)
    assert problem in found
    assert bool(found) == bool(problem)
