"""The command line of every benchmark: python -m benchmarks.NAME [--quick] [--tiny] [--list] [--output DIR]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import tiny
from benchmarks.measure import QUICK, Clock, Effort, ceilings, reason
from benchmarks.problem import Bench, Case, Yardstick
from benchmarks.rows import Origin, Recorder, Row
from benchmarks.session import Times, describe, device_is_lost, measure

RESULTS = Path(__file__).parent / "results"
NO_GPU = 4  # exit code of an environment that cannot do it
FAILED = 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the suite and each benchmark take."""
    parser.add_argument("--quick", action="store_true", help="the goals' cases only, fewer samples, fewer peers")
    tiny_help = "tiny sizes, on a CPU too: whether it runs, no figures"
    parser.add_argument("--tiny", action="store_true", help=tiny_help)
    parser.add_argument("--list", action="store_true", help="show what there is and measure nothing")
    parser.add_argument(
        "--case", action="append", default=[], metavar="WORDS",
        help='only cases whose names have these words, as "model=7B T=8192"; may be given again for others',
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the rows")
    parser.add_argument("--commit", help="recorded with the rows, where the tree is a copy without git")
    parser.add_argument("--run", help="go on with the run of this name (the suite does)")


def main(bench: Bench | Yardstick, argv: list[str]) -> int:
    """Measures the cases of one benchmark. Returns 0; 1 where ours failed or is wrong; 4 without a CUDA GPU,
    which --tiny does not need."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{bench.name}", description=bench.about)
    add_flags(parser)
    flags = parser.parse_args(argv)
    cases = chosen(bench, quick=flags.quick, wanted=flags.case)
    if not cases and flags.case:
        parser.error(f"no case has the words {' or '.join(map(repr, flags.case))}; --list shows those that there are")
    if flags.tiny:
        cases = tiny.cases(bench, cases)
    if flags.list:
        for case in cases:
            print(f"{case.name}  ({', '.join(case.modes)})")
        return 0
    if flags.tiny:
        return _try(bench, cases, quick=flags.quick)
    require_gpu()
    origin = describe(ceilings(), flags.commit, flags.run)
    print(f"{origin.gpu}: copy {origin.copy_gbps:.0f} GB/s, matrix product {origin.matrix_tflops:.0f} TFLOP/s")
    recorder = Recorder(flags.output, origin.run)
    clock = None if isinstance(bench, Yardstick) else Clock(QUICK if flags.quick else Effort())
    device = current_device()
    ours_failed = False
    for case in cases:
        for row in _rows(bench, case, device, clock, origin, flags.quick):
            row = recorded(recorder, row)
            print(as_text(row), flush=True)
            ours_failed |= row.failure is not None and row.variant.startswith("nibble")
    print(f"rows in {recorder.path}")
    return FAILED if ours_failed else 0


def chosen(bench: Bench | Yardstick, *, quick: bool, wanted: Sequence[str]) -> list[Case]:
    """Its cases; under --quick, and with --case, some of them."""
    cases = [case for case in bench.cases() if case.quick or not quick]
    words = [set(text.split()) for text in wanted]
    return [case for case in cases if not words or any(each <= set(case.name.split()) for each in words)]


def recorded(recorder: Recorder, row: Row) -> Row:
    """The row that was written: a failure in its place where a figure of it is none (not finite, negative)."""
    try:
        recorder.add(row)
    except ValueError as error:
        row = Row(
            bench=row.bench, case=row.case, variant=row.variant, dtype=row.dtype, mode=None, package=row.package,
            failure=f"no row: {error}", origin=row.origin,
        )  # fmt: skip
        recorder.add(row)
    return row


def require_gpu() -> None:
    """Ends the process with exit code 4 and one line where there is no GPU."""
    if not torch.cuda.is_available():
        print("benchmarks need a CUDA GPU, and torch finds none", file=sys.stderr)
        raise SystemExit(NO_GPU)


def current_device() -> torch.device:
    """The GPU, by its number, which torch's memory pools want; the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _try(bench: Bench | Yardstick, cases: Sequence[Case], *, quick: bool) -> int:
    """Runs tiny cases and says what came of them. Returns the exit code."""
    device = current_device()
    print(f"{bench.name} at tiny sizes on {device}: whether it runs, no figures")
    ours_failed = False
    for case in cases:
        for row in _rows(bench, case, device, tiny.Once(), tiny.NOWHERE, quick):
            print(tiny.in_words(row), flush=True)
            ours_failed |= row.failure is not None and tiny.must_run(row.variant, device)
    return FAILED if ours_failed else 0


def _rows(
    bench: Bench | Yardstick, case: Case, device: torch.device, clock: Times | None, origin: Origin, quick: bool
) -> Iterator[Row]:
    try:
        if isinstance(bench, Yardstick):
            yield from bench.rows(case, device, origin, quick)
        else:
            assert clock is not None
            yield from measure(bench, case, device, clock, origin, quick=quick)
    except Exception as error:  # no memory for the inputs, a reference that fails: the next case may do
        if device_is_lost():
            print(f"{case.name}: the device does not answer any more, the rest is not measured: {reason(error)}")
            raise SystemExit(FAILED) from error
        yield Row(
            bench=bench.name, case=dict(case.shape), variant="nibble", dtype="-", mode=None,
            failure=f"the case could not be measured: {reason(error)}", origin=origin,
        )  # fmt: skip


def as_text(row: Row) -> str:
    """One line for the terminal."""
    head = f"{row.bench:<22} {row.name:<34} {row.variant:<14}"
    if row.failure is not None:
        return f"{head} {row.mode or '':<9} -- {row.failure}"
    rate = f"{row.gbps:8.0f} GB/s" if row.gbps else f"{row.tflops:6.1f} TFLOP/s" if row.tflops else ""
    share = "" if row.fraction is None else f"{row.fraction:6.1%}"
    spread = f"[{row.ms_q20:.4f}, {row.ms_q80:.4f}]"
    error = "" if row.error is None else f"error {row.error:.1e}"
    if row.samples_per_s is not None:
        error = f"{row.samples_per_s:.2f} samples/s, {(row.allocated_bytes or 0) / 2**30:.2f} GiB {error}"
    return f"{head} {row.mode:<9} {row.ms:9.4f} ms {spread} {rate} {share}  {error}"
