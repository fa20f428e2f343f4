"""Whole optimiser steps of several trainers in one process: time in turns, memory of each, idle share, waits.

* Trainers are built and warmed up one after another. What one holds and needs beyond what was held before it is its
  memory: `allocated_bytes` of torch's allocator at the peak (a CUDA graph's memory counts when it is captured),
  `device_bytes` of the device, CUDA context included. Weights that it shares with another trainer are added to both.
* Then they take turns, a step each on the same samples; a step's time is the host's, from an idle device to an idle
  device, copies from the host included, so nothing that a loop leaves to its next step is for free. Kernels are
  compiled and graphs captured before.
* Idle share and waits are the profiler's, of two steps in a row: the share of the host's time for them in which nothing
  runs on the device, and the calls by which the host waits for it. The profiler itself slows launches down, those
  inside a graph too, so the share is an upper bound; `busy_ms`, of which it takes away nothing, is told as well.
* One that fails, at whatever point, ends its own part alone, and what is known of a trainer is handed on at once.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import reason
from benchmarks.session import device_is_lost
from benchmarks.trainers import Trainer
from benchmarks.workload import Workload


@dataclass(frozen=True, slots=True)
class Entrant:
    """A trainer that takes part. `profiled`: its idle share and waits are measured; what is timed later in the process
    is a little slower for it."""

    name: str
    build: Callable[[], Trainer]  # what it raises is reported in its place
    package: str | None = None  # distribution of a peer
    profiled: bool = False


@dataclass(slots=True)
class Steps:
    """What was measured of one trainer. None: not on this device, or not profiled."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    allocated_bytes: int | None = None
    device_bytes: int | None = None
    idle: float | None = None
    busy_ms: float | None = None
    syncs: int | None = None
    launches: int | None = None
    launched: str = ""  # how: for the row's setting

    def fields(self) -> dict[str, Any]:
        """Of a row."""
        return timing(self.seconds) | {
            "loss": statistics.mean(self.losses),
            "allocated_bytes": self.allocated_bytes, "device_bytes": self.device_bytes, "idle": self.idle,
            "busy_ms": self.busy_ms, "syncs": self.syncs, "launches": self.launches,
        }  # fmt: skip


def timing(seconds: Sequence[float]) -> dict[str, Any]:
    """What a row says of the time of steps."""
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "ms": 1e3 * statistics.median(seconds), "ms_q20": 1e3 * low, "ms_q80": 1e3 * high, "samples": len(seconds),
        "timing": "steps",
    }  # fmt: skip


@dataclass(slots=True, eq=False)
class _Running:
    """A trainer that is warm."""

    entrant: Entrant
    trainer: Trainer
    batches: list[Any]
    steps: Steps


def measure_steps(
    entrants: Sequence[Entrant], works: Sequence[Workload], device: torch.device, rounds: int
) -> Iterator[tuple[Entrant, Steps | str]]:
    """Each trainer with what was measured, or why nothing was: those that fail when they do, the others after the last
    round, those that are profiled at the end. A round is a step of each trainer on the same samples."""
    running: list[_Running] = []
    for entrant in entrants:
        why = ""
        try:
            running.append(_warm_up(entrant, works, device))
        except Exception as error:  # of any kind: what a peer raises is the finding
            why = told(error)
        release(device)  # what a failure held, too
        if why:
            yield entrant, why
    for done in range(rounds):
        first = done % max(1, len(running))
        for one in running[first:] + running[:first]:
            why = ""
            try:
                _timed(one, done, device)
            except Exception as error:
                why = told(error)
            if why:
                running.remove(one)
                yield one.entrant, why
    for one in running:
        one.steps.launched = one.trainer.launched()
    for one in sorted(running, key=lambda one: one.entrant.profiled):
        if one.entrant.profiled and device.type == "cuda":
            _profile(one)
        yield one.entrant, one.steps


def told(error: Exception) -> str:
    """One line about it; raises it where the device is lost, which is no word on what comes next."""
    if device_is_lost():
        raise error
    return reason(error)


def release(device: torch.device) -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _warm_up(entrant: Entrant, works: Sequence[Workload], device: torch.device) -> _Running:
    """Builds a trainer and runs a step of each workload: kernels compile, graphs are captured, AdamW has its state."""
    held = reserved = 0
    if device.type == "cuda":
        release(device)
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    trainer = entrant.build()
    batches = [trainer.prepare(work) for work in works]
    steps = Steps()
    if device.type == "cuda":
        release(device)
        torch.cuda.reset_peak_memory_stats()
    for batch in trainer.warm_ups * batches:
        _finite(trainer.step(batch))
    if device.type == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        steps.allocated_bytes = torch.cuda.max_memory_allocated() - held + trainer.borrowed_bytes
        steps.device_bytes = total - free - reserved + trainer.borrowed_bytes
    return _Running(entrant, trainer, batches, steps)


def _timed(one: _Running, number: int, device: torch.device) -> None:
    """Adds a step on the samples whose turn it is."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = one.trainer.step(one.batches[number % len(one.batches)])
    if device.type == "cuda":
        torch.cuda.synchronize()
    one.steps.seconds.append(time.perf_counter() - start)
    one.steps.losses.append(_finite(loss))


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: such a step may have left work out")
    return loss


def _profile(one: _Running) -> None:
    """Adds the profiler's figures. Without them the times still stand."""
    try:
        found = profile_steps(one.trainer, one.batches)
    except Exception as error:
        print(f"{one.entrant.name}: no idle share, no waits: {told(error)}", file=sys.stderr, flush=True)
        return
    if found is None:
        print(f"{one.entrant.name}: no idle share, no waits: the profiler saw no kernel (CUPTI?)", file=sys.stderr)
        return
    one.steps.idle, one.steps.busy_ms, one.steps.syncs, one.steps.launches = found


def profile_steps(trainer: Trainer, batches: Sequence[Any]) -> tuple[float, float, int, int] | None:
    """Idle share of two steps in a row; milliseconds of a step in which the device runs something; waits and launches a
    step. None where the profiler sees nothing (no CUPTI).

    Waits and launches are the difference of a profile of two steps and one of one step: what the profiler itself does
    at the end of a profile is in both. The first profile also has what it does at the start of a process.
    """
    one, two = (_events(trainer, [batches[0]] * count) for count in (1, 2))
    if not one.kernels or not two.kernels:
        return None
    busy = busy_time(two.kernels)
    return max(0.0, 1 - busy / two.wall), busy / 2e3, two.waits - one.waits, len(two.kernels) - len(one.kernels)


@dataclass(slots=True)
class _Events:
    kernels: list[tuple[float, float]]  # begin and end on the device, us: kernels, copies, fills
    waits: int
    wall: float  # us of the host


def _events(trainer: Trainer, batches: Sequence[Any]) -> _Events:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for batch in batches:
            trainer.step(batch)  # waits for its loss, the last of what it launches
        wall = time.perf_counter() - start
    found = _Events([], 0, 1e6 * wall)
    events: Any = profile.events()
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            found.kernels.append((event.time_range.start, event.time_range.end))
        elif "Synchronize" in event.name:
            found.waits += 1
    return found


def busy_time(kernels: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the intervals (begin, end) runs."""
    busy, last = 0.0, -math.inf
    for start, end in sorted(kernels):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy
