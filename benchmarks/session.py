"""One benchmark from its cases to its rows: build, check, time, write down. What goes wrong becomes a row too."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from benchmarks.lanes import Drawn, Lane, arrange, check, draw, expect
from benchmarks.measure import Ceilings, Timing, count_sets, reason, restorer
from benchmarks.problem import Bench, Case, Cost, Inputs, Mode, Problem, Variant
from benchmarks.rows import Origin, Row, run_name

ROOT = Path(__file__).resolve().parents[1]


class Times(Protocol):
    """benchmarks.measure.Clock, or what stands for it where there is no GPU."""

    def interleaved(
        self, lanes: Sequence[Lane], mode: Mode, restore: Callable[[], object]
    ) -> dict[str, Timing | str]: ...


def measure(
    bench: Bench, case: Case, device: torch.device, clock: Times, origin: Origin, *, quick: bool = False
) -> Iterator[Row]:
    """The rows of one case, variants that are missing or wrong first."""
    ceilings = Ceilings(origin.copy_gbps, origin.matrix_tflops)
    torch.compiler.reset()  # or torch.compile falls back to eager once it has seen too many shapes
    problem = bench.problem(case, device)
    variants = [variant for variant in problem.variants if variant.quick or not quick]
    blank = Row(
        bench=bench.name, case=dict(case.shape), variant="-", dtype=_text(problem.dtype), mode=None, origin=origin
    )

    def row(variant: Variant, mode: Mode | None, **values: Any) -> Row:
        package = _package(variant.package)
        now = replace(origin, date=_now())
        return replace(blank, variant=variant.name, mode=mode, package=package, origin=now, **values)

    drawn = draw(problem, _sets(problem, case, ceilings, len(variants), device), device)
    lanes, failures = _lanes(problem, variants, drawn)
    for variant, why in failures:
        yield row(variant, None, failure=why)
    restore = restorer(drawn, [s for lane in lanes for s in lane.drawn])
    for mode in case.modes:
        cost = problem.cost[mode]
        copies = [_copy_lane(cost.bytes, len(drawn), device)] if cost.bytes and lanes else []
        try:
            found = clock.interleaved([*lanes, *copies], mode, restore)
        except RuntimeError as error:
            if device_is_lost():
                raise
            found = {lane.variant.name: reason(error) for lane in [*lanes, *copies]}
        for lane in [*lanes, *copies]:
            timing = found[lane.variant.name]
            if isinstance(timing, str):
                yield row(lane.variant, mode, failure=timing)
            else:
                yield row(lane.variant, mode, error=lane.error, **asdict(timing), **_rates(cost, timing.ms, ceilings))


def new_row(case: Case, variant: str, dtype: str, origin: Origin, package: str | None) -> Callable[..., Row]:
    """A function that makes a row of what is known of it; its date is now."""

    def row(mode: Mode | None = None, **values: Any) -> Row:
        return Row(
            bench=case.bench, case=dict(case.shape), variant=variant, dtype=dtype, mode=mode,
            package=_package(package), origin=replace(origin, date=_now()), **values,
        )  # fmt: skip

    return row


def device_is_lost() -> bool:
    """After an illegal access, which may be a peer's, everything fails: that is no word on what comes next."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _sets(problem: Problem, case: Case, ceilings: Ceilings, variants: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    costs = [problem.cost[mode] for mode in case.modes]
    seconds, moved = min(_least_seconds(cost, ceilings) for cost in costs), max(cost.bytes or 0 for cost in costs)
    return count_sets(sum(x.nbytes for x in draw(problem, 1, device)[0].tensors()), moved, seconds, variants)


def _least_seconds(cost: Cost, ceilings: Ceilings) -> float:
    return (cost.bytes or 0) / ceilings.copy_gbps / 1e9 + (cost.flops or 0) / ceilings.matrix_tflops / 1e12


def _lanes(
    problem: Problem, variants: Sequence[Variant], drawn: list[Drawn]
) -> tuple[list[Lane], list[tuple[Variant, str]]]:
    """Variants that are right, and why the others are not there."""
    lanes: list[Lane] = []
    failures: list[tuple[Variant, str]] = []
    expected = expect(problem, drawn[0])
    for variant in variants:
        try:
            call = variant.build()
            error = None if variant.floor else check(problem, variant, call, drawn[0], expected)
            lanes.append(Lane(variant, call, [arrange(variant, s) for s in drawn], error))
        except Exception as problem_met:  # of any kind: what a peer raises is the finding
            failures.append((variant, reason(problem_met)))
    return lanes, failures


def _copy_lane(count: int, sets: int, device: torch.device) -> Lane:
    """A copy that moves `count` bytes, half of them read, half of them written."""

    def buffers() -> Drawn:
        source = torch.randint(256, (max(1, count // 2),), dtype=torch.uint8, device=device)
        return Drawn({"source": source, "target": torch.empty_like(source)}, (), ())

    def copy(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs["target"].copy_(inputs["source"]),)

    return Lane(Variant("copy", lambda: copy, floor=True), copy, [buffers() for _ in range(sets)], None)


def _rates(cost: Cost, ms: float, ceilings: Ceilings) -> dict[str, Any]:
    if cost.bytes:
        gbps = cost.bytes / ms / 1e6
        return {"bytes": cost.bytes, "gbps": gbps, "fraction": gbps / ceilings.copy_gbps}
    if cost.flops:
        tflops = cost.flops / ms / 1e9
        return {"flops": cost.flops, "tflops": tflops, "fraction": tflops / ceilings.matrix_tflops}
    return {}


def new_run(commit: str | None) -> str:
    """The name of a run that begins now."""
    return run_name(_now(), commit or _git()[0], torch.cuda.get_device_name())


def describe(ceilings: Ceilings, commit: str | None, run: str | None) -> Origin:
    """Where the rows of this process come from. `commit`: for a tree that has no git; `run`: to go on with a run."""
    found, dirty = _git()
    return Origin(
        run=run or new_run(commit), date=_now(), commit=commit or found, dirty=dirty, gpu=torch.cuda.get_device_name(),
        driver=_driver(), torch=torch.__version__, triton=triton.__version__, python=platform.python_version(),
        copy_gbps=ceilings.copy_gbps, matrix_tflops=ceilings.matrix_tflops,
    )  # fmt: skip


def _git() -> tuple[str, bool]:
    """Short commit and whether the tree differs from it; a row that is written does not count."""
    try:
        commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
    return commit, bool(changed)


def _driver() -> str:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _package(name: str | None) -> str | None:
    try:
        return None if name is None else f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
