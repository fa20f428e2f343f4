"""The rows of a run: what one variant of one case did on one card, with where and when it was measured.

A run writes one file, DIR/DATE-COMMIT-GPU.jsonl, a line a row, as it goes. Rows are appended, never edited.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MODES = ("forward", "backward", "full", "step")


def case_name(shape: Mapping[str, object]) -> str:
    """The name by which goals and tables know a case: "T=512 D=4096"."""
    return " ".join(f"{key}={value}" for key, value in shape.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row comes from: the same for all rows of a process, but for `date`."""

    run: str  # the file's name without .jsonl
    date: str  # UTC, when the row was measured: 2026-11-21T05:12:30+00:00
    commit: str
    dirty: bool  # the working tree differed from the commit
    gpu: str
    driver: str
    torch: str
    triton: str
    python: str
    copy_gbps: float  # ceilings that this process measured before anything else
    matrix_tflops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement, or why there is none (`failure`). Times in milliseconds a call, sizes in bytes."""

    bench: str
    case: dict[str, Any]
    variant: str  # "nibble" is ours
    dtype: str
    mode: str | None  # of MODES; None where a variant failed before any mode could be timed
    failure: str | None = None
    package: str | None = None  # distribution and version of a peer
    ms: float | None = None  # median
    ms_q20: float | None = None
    ms_q80: float | None = None
    samples: int | None = None
    # "graph": replays of a CUDA graph; "stream": calls behind a busy queue; "steps": whole steps, by the host's clock
    timing: str | None = None
    bytes: int | None = None  # the least that must move; only one of bytes and flops is given
    flops: int | None = None
    gbps: float | None = None
    tflops: float | None = None
    fraction: float | None = None  # of copy_gbps or matrix_tflops
    peak_bytes: int | None = None  # above what was allocated before the call
    extra_bytes: int | None = None  # of them not part of the results, nor kept for the backward
    saved_bytes: int | None = None  # kept for the backward beside inputs and outputs (forward only)
    launches: int | None = None  # kernels, copies and fills of one call; None where the profiler saw nothing
    host_us: float | None = None  # of one call until it returns
    waits: bool | None = None  # the host waits for the device within the call
    error: float | None = None  # ||x - reference|| / ||reference||, the worst of all results and gradients
    # of whole optimiser steps (end_to_end, packing, parity)
    samples_per_s: float | None = None
    loss: float | None = None  # mean of the steps
    tokens_per_s: float | None = None  # real ones: no padding, no modality tokens
    allocated_bytes: int | None = None  # the most that torch's allocator gave at once
    device_bytes: int | None = None  # the most taken of the device: reserved memory, CUDA context, libraries
    idle: float | None = None  # share of a step in which nothing runs on the device, under the profiler
    busy_ms: float | None = None  # of a step in which something runs there, likewise
    syncs: int | None = None  # times that the host waits for the device in a step
    policy: str | None = None  # what layers keep for the backward pass
    setting: str | None = None  # how weights are unpacked and steps launched
    ran: dict[str, Any] | None = None  # of ours, what a prediction of it needs (engine_setting.py)
    plan_bytes: int | None = None  # what --plan predicted for this run, beside allocated_bytes
    plan_tokens_per_s: float | None = None
    efficiency: float | None = None  # real tokens of those computed
    origin: Origin

    @property
    def name(self) -> str:
        return case_name(self.case)

    def flat(self) -> dict[str, Any]:
        """One dictionary, the origin's fields among the others."""
        values = asdict(self)
        return values | values.pop("origin")


_ORIGIN = {field.name for field in fields(Origin)}
_OWN = {field.name for field in fields(Row)} - {"origin"}
_TEXT = {"bench", "variant", "dtype", "run", "date", "commit", "gpu", "driver", "torch", "triton", "python"}
_OPTIONAL_TEXT = {"mode", "failure", "package", "timing", "policy", "setting"}
_FLAGS = {"dirty", "waits"}


def parse(values: Mapping[str, Any]) -> Row:
    """The row that `Row.flat` gave. Raises ValueError for what is missing, unknown or no such value."""
    missing, unknown = sorted((_ORIGIN | _OWN) - values.keys()), sorted(values.keys() - _ORIGIN - _OWN)
    if missing or unknown:
        raise ValueError(f"missing {missing}, unknown {unknown}")
    for name, value in values.items():
        if not _is_valid(name, value):
            raise ValueError(f"{name} got {value!r}")
    row = Row(**{name: values[name] for name in _OWN}, origin=Origin(**{name: values[name] for name in _ORIGIN}))
    if row.mode not in (*MODES, None):
        raise ValueError(f"mode got {row.mode!r}; accepted: {', '.join(MODES)}")
    if (row.ms is None) == (row.failure is None) or (row.mode is None and row.failure is None):
        raise ValueError("a row has a time and a mode, or a failure")
    if row.bytes is not None and row.flops is not None:
        raise ValueError("a row is measured against bytes or against flops")
    return row


def _is_valid(name: str, value: object) -> bool:
    if name in _TEXT:
        return isinstance(value, str) and value != ""
    if name in _OPTIONAL_TEXT:
        return value is None or (isinstance(value, str) and value != "")
    if name in _FLAGS:
        return isinstance(value, bool) or (value is None and name in _OWN)
    if name == "case":
        return isinstance(value, dict) and bool(value)
    if name == "ran":
        return value is None or (isinstance(value, dict) and bool(value))
    if value is None:
        return name in _OWN
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


class Recorder:
    """Appends rows to the run's file, each as soon as it is known."""

    def __init__(self, folder: Path, run: str) -> None:
        self.path = folder / f"{run}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        line = json.dumps(parse(row.flat()).flat(), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def run_name(date: str, commit: str, gpu: str) -> str:
    """2026-11-21T05:12:30+00:00, af7e4ca, NVIDIA H200 -> 20261121-051230-af7e4ca-NVIDIA-H200"""
    day, time = re.sub(r"[-:]", "", date)[:15].split("T")
    return f"{day}-{time}-{commit}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}"


def read(folder: Path) -> list[Row]:
    """All rows of a folder, file after file. Raises ValueError naming file and line where one is no row."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in _read_file(path)]


def _read_file(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield parse(json.loads(line))
        except ValueError as error:  # json's own errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}") from error


def latest(rows: list[Row]) -> list[Row]:
    """Those that count: of each card and case the run that measured it last, of each measurement in it the last row.

    What is compared is thus of one process, and the cases of a benchmark may be measured in several runs.
    """
    ended: dict[tuple[str, str, str], tuple[str, str]] = {}
    for row in rows:
        key, when = (row.origin.gpu, row.bench, row.name), (row.origin.date, row.origin.run)
        ended[key] = max(when, ended.get(key, when))
    chosen: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.origin.date):
        if row.origin.run == ended[row.origin.gpu, row.bench, row.name][1]:
            chosen[row.origin.gpu, row.bench, row.name, row.dtype, row.mode or "", row.variant] = row
    return list(chosen.values())
