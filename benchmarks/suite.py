"""Everything that needs a GPU, as one command: csrc is built, kernels tested, timed beside their peers, whole steps.

    python -m benchmarks.suite [--quick] [--tiny] [--only NAME ...] [--case WORDS] [--seconds N] [--list] [--output DIR]

Each part runs in a process of its own, so that one that fails, or takes the device down, does not stop the others. What
the whole project is for comes first, so that it is there when the time is over.
With --tiny no GPU is needed, kernels' tests are left to pytest, and no rows are written.
Exit code 0; 1 where a part failed or was not reached in time; 4 without a CUDA GPU, where one is needed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.command import FAILED, add_flags, chosen, require_gpu
from benchmarks.problem import Bench, Yardstick
from benchmarks.session import ROOT, new_run

KERNELS = (
    "rms_norm", "layer_norm", "norm_mma", "projector", "rope", "swiglu", "dropped_sum", "attention",
    "linear_cross_entropy", "adamw", "dequantize_nf4", "linear_nf4", "linear_nf4_chain", "linear_int8", "lora_linear",
)  # fmt: skip
BENCHES = ("step", *KERNELS, "decode")
YARDSTICKS = ("end_to_end", "parity", "packing", "families")
BEFORE = ("csrc", "tests")  # no benchmarks
PARTS = (*BEFORE, "step", *YARDSTICKS, *KERNELS, "decode")
GROUPS = {"kernels": (*KERNELS, "decode"), "whole": ("step", *YARDSTICKS)}
TESTS = ("pytest", "-q", "tests/csrc", "tests/kernels")
QUICK_SECONDS = 460.0  # of --quick in all: eight minutes, less what starting and stopping takes


@dataclass(frozen=True, slots=True)
class Outcome:
    part: str
    problem: str  # empty where all is well
    seconds: float


def bench(name: str) -> Bench:
    """The benchmark of this name."""
    found: Bench = importlib.import_module(f"benchmarks.{name}").BENCH
    return found


def part(name: str) -> Bench | Yardstick:
    """The benchmark of this name, of one op or of whole steps."""
    if name not in YARDSTICKS:
        return bench(name)
    found: Yardstick = importlib.import_module(f"benchmarks.{name}").YARDSTICK
    return found


def main(argv: list[str]) -> int:
    """Runs the parts one after another. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    names = (*PARTS, *GROUPS)
    parts_help = f"these parts, in the suite's order: {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=parts_help)
    limit_help = f"stop then, with what was measured (--quick: {QUICK_SECONDS:g})"
    parser.add_argument("--seconds", type=float, metavar="N", help=limit_help)
    flags = parser.parse_args(argv)
    wanted = {part for name in flags.only or PARTS for part in GROUPS.get(name, (name,))}
    parts = [name for name in PARTS if name in wanted and not (flags.tiny and name == "tests")]
    without = [
        name for name in parts
        if flags.case and name not in BEFORE and not chosen(part(name), quick=flags.quick, wanted=flags.case)
    ]  # fmt: skip
    if without:
        parser.error(f"no case of {', '.join(without)} has the words of --case: name others with --only")
    if flags.list:
        for name in parts:
            print(f"{name:<22} {_about(name)}")
        return 0
    if flags.tiny:
        run, passed_on = "", ["--tiny"]
    else:
        require_gpu()
        run = flags.run or new_run(flags.commit)
        passed_on = ["--output", str(flags.output.resolve()), "--run", run]
        passed_on += ["--commit", flags.commit] if flags.commit else []
    passed_on += [word for text in flags.case for word in ("--case", text)]
    passed_on += ["--quick"] if flags.quick else []
    seconds = QUICK_SECONDS if flags.seconds is None and flags.quick else flags.seconds
    deadline = None if seconds is None else time.monotonic() + seconds
    outcomes = [_run(name, passed_on, deadline, quick=flags.quick) for name in parts]
    print("\n" + "\n".join(f"{o.part:<22} {o.seconds:6.1f} s  {o.problem or 'ok'}" for o in outcomes))
    if not flags.tiny:
        print(f"rows in {flags.output / run}.jsonl; python -m benchmarks.report makes tables of them")
    return FAILED if any(o.problem for o in outcomes) else 0


def _about(name: str) -> str:
    if name == "csrc":
        return "the CUDA library is built, where nvcc is and it is not up to date"
    if name == "tests":
        return "the kernels' tests on the GPU; with --quick or without pytest, the doctor's check of every kernel"
    found = part(name)
    first_line = found.about.strip().splitlines()[0]
    return f"{len(found.cases())} cases. {first_line}"


def _run(name: str, flags: list[str], deadline: float | None, *, quick: bool) -> Outcome:
    start = time.monotonic()
    left = None if deadline is None else deadline - start
    if left is not None and left <= 0:
        return Outcome(name, "not reached: the time is over", 0.0)
    words = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    if name == "csrc":
        words = [sys.executable, "-m", "csrc.build", "--optional"]
    elif name == "tests":
        in_full = not quick and importlib.util.find_spec("pytest") is not None
        words = [sys.executable, "-m", *(TESTS if in_full else ("benchmarks.checks",))]
    print(f"\n== {name}", flush=True)
    try:
        code = subprocess.run(words, cwd=ROOT, timeout=left, check=False).returncode
        problem = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = "stopped: its time was over; what it had measured is kept"
    return Outcome(name, problem, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
