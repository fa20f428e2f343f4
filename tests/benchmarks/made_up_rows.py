"""Rows for tests. None of their figures was ever measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.conditions import Condition, Goal
from benchmarks.rows import Origin, Recorder, Row

ORIGIN = Origin(
    run="20000101-000000-test-Made-Up-H200", date="2000-01-01T00:00:00+00:00", commit="test", dirty=False,
    gpu="Made-Up H200", driver="0", torch="0", triton="0", python="0", copy_gbps=1000.0, matrix_tflops=100.0,
)  # fmt: skip


def row(bench: str = "rope", case: dict[str, Any] | None = None, mode: str | None = "forward", **values: Any) -> Row:
    """A row with a time of one millisecond unless `values` has a failure; `values` may change the origin too."""
    origin = {name: values.pop(name) for name in list(values) if name in Origin.__slots__}
    timed = {} if "failure" in values else {
        "ms": 1.0, "ms_q20": 0.9, "ms_q80": 1.1, "samples": 20, "timing": "graph", "bytes": 10**6, "gbps": 1.0,
        "fraction": 0.5, "peak_bytes": 0, "extra_bytes": 0, "launches": 1, "host_us": 10.0, "waits": False,
        "error": 0.0,
    }  # fmt: skip
    values = {"variant": "nibble", "dtype": "bfloat16", **timed, **values}
    return Row(bench=bench, case=case or {"T": 8}, mode=mode, origin=replace(ORIGIN, **origin), **values)


def shape(name: str) -> dict[str, Any]:
    """The case of a name, its values as text: enough for the name to come out again."""
    return dict(part.split("=") for part in name.split())


def fulfilling(condition: Condition) -> list[Row]:
    """Rows with which the condition holds by far."""
    found = []
    for case in condition.cases:
        of_ours: dict[str, Any] = {"ms": 1e-3, "fraction": 0.999, "saved_bytes": 1, "variant": condition.ours}
        of_ours |= {"samples_per_s": 1e3, "allocated_bytes": 1, "idle": 0.0, "syncs": 0, "efficiency": 1.0}
        found.append(row(condition.bench, shape(case), condition.mode, **of_ours))
        if condition.peer:
            slow = condition.sense == ">="
            of_peer = {"ms": 1.0 if slow else 1e-3, "saved_bytes": 100, "error": 0.1, "variant": condition.peer}
            found.append(row(condition.bench, shape(case), condition.mode, **of_peer))
    return found


def all_fulfilling(goal: Goal) -> list[Row]:
    return [row for condition in goal.conditions for row in fulfilling(condition)]


def record(folder: Path, rows: list[Row]) -> None:
    """Into folder/results, each run a file."""
    for row in rows:
        Recorder(folder / "results", row.origin.run).add(row)
