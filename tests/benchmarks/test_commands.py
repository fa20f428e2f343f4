"""The commands off a GPU, what they list, and that a part of the suite that fails does not stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checks, command, end_to_end, suite
from benchmarks.rows import Recorder, read
from engine.op_checks import OpCheck
from tests.benchmarks.made_up_rows import row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", (*suite.BENCHES, *suite.YARDSTICKS))
def test_a_benchmark_needs_a_gpu(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(suite.part(name), ["--output", str(tmp_path)])
    assert ended.value.code == 4
    assert capsys.readouterr().err == "benchmarks need a CUDA GPU, and torch finds none\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["benchmarks.suite", "--quick"], ["benchmarks.rope"], ["benchmarks.checks"]])
def test_the_process_ends_with_exit_code_4(words: list[str]) -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=hidden, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.splitlines()[-1] == "benchmarks need a CUDA GPU, and torch finds none"


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_device_ends_the_part_and_blames_nobody(
    lost: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(command, "measure", failing)
    monkeypatch.setattr(command, "device_is_lost", lambda: lost)
    bench: Any = suite.bench("rope")
    rows = command._rows(bench, bench.cases()[0], torch.device("cpu"), object(), None, False)  # type: ignore[arg-type]
    if lost:
        with pytest.raises(SystemExit, match="1"):
            list(rows)
        assert "illegal memory access" in capsys.readouterr().out
    else:
        assert [row.failure is not None for row in rows] == [True]


@pytest.mark.usefixtures("no_gpu")
def test_lists_need_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(suite.PARTS)
    assert suite.main(["--list", "--only", "rope"]) == 0
    assert capsys.readouterr().out.startswith("rope ")
    assert command.main(suite.bench("rms_norm"), ["--list", "--quick"]) == 0
    assert "T=512 D=4096 add=0  (forward, backward, full)" in capsys.readouterr().out


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (suite.main, lambda argv: command.main(suite.bench("rope"), argv)):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in ("--quick", "--tiny", "--list", "--output"))


def test_a_part_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(["--only", "gemm"])
    assert ended.value.code == 2
    assert "rms_norm" in capsys.readouterr().err


class Processes:
    """Stands for subprocess.run: notes what was started, and ends as it is told."""

    def __init__(self, codes: dict[str, int], late: str = "") -> None:
        self.codes, self.late = codes, late
        self.started: list[list[str]] = []

    def __call__(self, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.started.append(words)
        others = "csrc" if "csrc.build" in words else "tests"
        part = next((name for name in suite.PARTS if f"benchmarks.{name}" in words), others)
        if part == self.late:
            raise subprocess.TimeoutExpired(words, 1.0)
        return subprocess.CompletedProcess(words, self.codes.get(part, 0))


def run_suite(monkeypatch: pytest.MonkeyPatch, processes: Processes, *flags: str) -> int:
    monkeypatch.setattr(suite, "require_gpu", lambda: None)
    monkeypatch.setattr(suite, "new_run", lambda commit: "run")
    monkeypatch.setattr(suite.subprocess, "run", processes)
    return suite.main(list(flags))


def test_a_part_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    processes = Processes({"tests": 1, "rope": 139}, late="swiglu")
    assert run_suite(monkeypatch, processes, "--output", str(tmp_path), "--commit", "abc") == 1
    assert len(processes.started) == len(suite.PARTS)
    assert processes.started[0][1:] == ["-m", "csrc.build", "--optional"]
    assert processes.started[1][1:] == ["-m", *suite.TESTS]
    (rms_norm,) = (words for words in processes.started if "benchmarks.rms_norm" in words)
    assert rms_norm[2:] == [
        "benchmarks.rms_norm",
        "--output",
        str(tmp_path),
        "--run",
        "run",
        "--commit",
        "abc",
    ]
    summary = capsys.readouterr().out
    assert "exit code 139" in summary and "stopped: its time was over" in summary
    assert summary.count("  ok\n") == len(suite.PARTS) - 3


def test_quick_and_a_machine_without_pytest_check_the_kernels_as_the_doctor_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for flags, installed in (["--quick"], True), ([], False):
        processes = Processes({})
        monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name, found=installed: found or None)
        assert run_suite(monkeypatch, processes, "--only", "tests", *flags) == 0
        assert [words[1:] for words in processes.started] == [["-m", "benchmarks.checks"]]


def test_a_kernel_that_the_doctor_finds_wrong_fails_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "require_gpu", lambda: None)
    for error, code in (1e-6, 0), (0.5, 1):
        op = OpCheck(op="rope", backend="triton", why="", forward=error, backward=error, allowed=1e-3)
        monkeypatch.setattr(checks, "check_ops", lambda device, dtype, found=op: [found])
        assert checks.main() == code
    assert "WRONG rope" in capsys.readouterr().out


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes({})
    assert run_suite(monkeypatch, processes, "--only", "adamw", "--quick") == 0
    ((_, _, module, *flags),) = processes.started
    assert (module, flags[-1]) == ("benchmarks.adamw", "--quick")


def test_quick_ends_in_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.QUICK_SECONDS < 480
    monkeypatch.setattr(suite, "QUICK_SECONDS", 0.0)
    processes = Processes({})
    assert run_suite(monkeypatch, processes, "--quick") == 1
    assert processes.started == []
    assert capsys.readouterr().out.count("not reached: the time is over") == len(suite.PARTS)


def test_a_limit_of_seconds_is_no_other_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a machine that is lent for a while: all tests, all cases."""
    processes = Processes({})
    assert run_suite(monkeypatch, processes, "--seconds", "500", "--only", "tests", "rope") == 0
    (_, _, *tests), (_, _, *rope) = processes.started
    assert tests == list(suite.TESTS) and rope[0] == "benchmarks.rope" and "--quick" not in rope
    assert run_suite(monkeypatch, processes, "--seconds", "0", "--only", "rope") == 1
    assert len(processes.started) == 2


def test_some_parts_in_the_suites_order_and_some_of_their_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes({})
    assert run_suite(monkeypatch, processes, "--only", "parity", "end_to_end", "csrc", "--case", "model=7B") == 0
    build, *parts = processes.started
    assert build[2] == "csrc.build"
    assert [words[2] for words in parts] == ["benchmarks.end_to_end", "benchmarks.parity"]
    assert all(words[-2:] == ["--case", "model=7B"] for words in parts)


def test_groups_are_all_the_benchmarks() -> None:
    kernels, whole = suite.GROUPS["kernels"], suite.GROUPS["whole"]
    assert sorted((*suite.BEFORE, *kernels, *whole)) == sorted(suite.PARTS)
    assert sorted((*kernels, *whole)) == sorted((*suite.BENCHES, *suite.YARDSTICKS))


@pytest.mark.usefixtures("no_gpu")
def test_cases_are_chosen_by_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*flags: str) -> list[str]:
        assert command.main(suite.part("end_to_end"), ["--list", *flags]) == 0
        return capsys.readouterr().out.splitlines()

    words = "T=8192 model=13B"
    assert len(listed("--case", words)) == 1 and "model=13B T=8192" in listed("--case", words)[0]
    assert len(listed("--case", "model=7B", "--case", "model=13B")) == len(listed())
    assert len(listed("--case", "model=7B", "--quick")) < len(listed("--case", "model=7B"))
    with pytest.raises(SystemExit, match="2"):
        command.main(suite.part("end_to_end"), ["--case", "model=7"])
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--only", "end_to_end", "rope", "--case", "model=7B"])
    assert "no case of rope has the words" in capsys.readouterr().err


def test_a_figure_that_is_none_is_a_failure_and_ends_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "run")
    for made in row(error=float("nan")), row(variant="torch"):
        command.recorded(recorder, made)
    found = read(tmp_path)
    assert [(one.variant, one.failure) for one in found] == [("nibble", "no row: error got nan"), ("torch", None)]
    assert found[0].ms is None


def test_a_case_gets_a_device_with_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.use_mem_pool, under our CUDA graphs, refuses one without: "Expected a torch.device with a specified
    index"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert command.current_device() == torch.device("cuda", 3)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("name", "case", "said"),
    [
        ("rope", "T=512 d=128", "T=50 H=2 d=128 r=128: nibble ran backward, "),
        ("end_to_end", "samples=1 model=7B", "model=toy T=128 samples=1 policy=keep_input cap=0: nibble ran step, "),
    ],
)
def test_tiny_runs_on_a_cpu_and_writes_nothing(
    name: str, case: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.main(suite.part(name), ["--tiny", "--quick", "--case", case, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{name} at tiny sizes on cpu: whether it runs, no figures"
    (ours,) = (line for line in lines if line.startswith(said))
    assert ("loss" in ours) == (name == "end_to_end")
    assert not any("nibble did not run" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_gpu")
def test_tiny_runs_every_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(end_to_end, "FULL", 2)
    assert command.main(end_to_end.YARDSTICK, ["--tiny", "--case", "samples=2"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()  # 7B's case and 13B's are the same here
    assert sorted(line.split(": ")[1].split()[0] for line in lines) == sorted(("nibble", *end_to_end.PEERS))
    assert all(", loss " in line or " did not run: " in line for line in lines)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("variant", "code"), [("nibble", 1), ("nibble_triton", 0), ("liger", 0)])
def test_tiny_fails_where_the_engine_does(variant: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    bench: Any = suite.part("packing")
    failed = row(variant=variant, mode=None, failure="RuntimeError: gone")
    broken = replace(bench, rows=lambda *_: iter([failed]))
    assert command.main(broken, ["--tiny", "--case", "T=2048"]) == code
    assert f"T=8: {variant} did not run: RuntimeError: gone" in capsys.readouterr().out
    raising = replace(bench, rows=lambda *_: 1 / 0)
    assert command.main(raising, ["--tiny", "--case", "T=2048"]) == 1
    assert "nibble did not run: the case could not be measured: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_the_suite_hands_tiny_on_and_leaves_the_kernels_tests_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = Processes({})
    monkeypatch.setattr(suite.subprocess, "run", processes)
    assert suite.main(["--tiny", "--quick", "--only", "csrc", "tests", "whole"]) == 0
    build, *parts = processes.started
    assert build[2] == "csrc.build"
    assert [words[2] for words in parts] == [f"benchmarks.{name}" for name in suite.GROUPS["whole"]]
    assert all(words[3:] == ["--tiny", "--quick"] for words in parts)
    assert "rows in" not in capsys.readouterr().out


def test_nothing_but_torch_is_needed() -> None:
    """Told by a fresh interpreter, so that what the modules import in turn counts too."""
    modules = [f"benchmarks.{name}" for name in ("suite", "report", "checks", *suite.BENCHES, *suite.YARDSTICKS)]
    script = f"""
import importlib, sys
import numpy, torch, triton
before = set(sys.modules)
for module in {modules}:
    importlib.import_module(module)
print(*sorted({{module.partition(".")[0] for module in set(sys.modules) - before}}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    brought = {module for module in done.stdout.split() if module not in sys.stdlib_module_names}
    assert brought <= {"torch", "triton", "numpy", "csrc", "kernels", "models", "engine", "benchmarks"}
