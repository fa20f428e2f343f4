"""Whole optimiser steps of several trainers in one process: time in turns, memory of each, idle share, waits.

* Trainers are built and warmed up one after another. What one holds and needs beyond what was held before it is its
  memory: `allocated_bytes` of torch's allocator at the peak (a CUDA graph's memory counts when it is captured),
  `device_bytes` of the device, CUDA context included. Weights that it shares with another trainer are added to both.
* Then they take turns, a step each on the same samples; a step's time is the host's, from an idle device to an idle
  device, so nothing that a loop leaves to its next step is for free.
* Idle share and waits are the profiler's, of two steps in a row: the share of the time from the first kernel to the
  last in which nothing runs on the device, and the calls by which the host waits for it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import reason
from benchmarks.session import device_is_lost
from benchmarks.trainers import Trainer
from benchmarks.workload import Workload


@dataclass(frozen=True, slots=True)
class Entrant:
    """A trainer that takes part. `profiled`: its idle share and waits are measured (a profile of an eager loop's step
    is very long)."""

    name: str
    build: Callable[[], Trainer]  # what it raises is reported in its place
    package: str | None = None  # distribution of a peer
    profiled: bool = False
    quick: bool = True


@dataclass(slots=True)
class Steps:
    """What was measured of one trainer. None: not on this device, or not profiled."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    allocated_bytes: int | None = None
    device_bytes: int | None = None
    idle: float | None = None
    syncs: int | None = None
    launches: int | None = None

    def fields(self) -> dict[str, Any]:
        """Of a row."""
        return timing(self.seconds) | {
            "allocated_bytes": self.allocated_bytes, "device_bytes": self.device_bytes, "idle": self.idle,
            "syncs": self.syncs, "launches": self.launches,
        }  # fmt: skip


def timing(seconds: Sequence[float]) -> dict[str, Any]:
    """What a row says of the time of steps."""
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "ms": 1e3 * statistics.median(seconds), "ms_q20": 1e3 * low, "ms_q80": 1e3 * high, "samples": len(seconds),
        "timing": "steps",
    }  # fmt: skip


def measure_steps(
    entrants: Sequence[Entrant], works: Sequence[Workload], device: torch.device, rounds: int
) -> dict[str, Steps | str]:
    """By name: what was measured, or why nothing was. Each round is a step of each trainer on the same samples."""
    found: dict[str, Steps | str] = {}
    running: list[tuple[str, Trainer, list[Any]]] = []
    for entrant in entrants:
        try:
            trainer, batches, found[entrant.name] = _warm_up(entrant, works, device)
            running.append((entrant.name, trainer, batches))
        except Exception as error:  # of any kind: what a peer raises is the finding
            if device_is_lost():
                raise
            found[entrant.name] = reason(error)
        release(device)
    for done in range(rounds):
        first = done % max(1, len(running))
        for name, trainer, batches in running[first:] + running[:first]:
            steps = found[name]
            assert isinstance(steps, Steps)
            seconds, loss = _timed(trainer, batches[done % len(batches)], device)
            steps.seconds.append(seconds)
            steps.losses.append(loss)
    profiled = {entrant.name for entrant in entrants if entrant.profiled}
    for name, trainer, batches in running if device.type == "cuda" else ():
        steps = found[name]
        if name in profiled and isinstance(steps, Steps):
            steps.idle, steps.syncs, steps.launches = profile_steps(trainer, batches)
    return found


def release(device: torch.device) -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _warm_up(entrant: Entrant, works: Sequence[Workload], device: torch.device) -> tuple[Trainer, list[Any], Steps]:
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
        if not math.isfinite(loss := trainer.step(batch)):
            raise FloatingPointError(f"the loss is {loss}: such a step may have left work out")
    if device.type == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        steps.allocated_bytes = torch.cuda.max_memory_allocated() - held + trainer.borrowed_bytes
        steps.device_bytes = total - free - reserved + trainer.borrowed_bytes
    return trainer, batches, steps


def _timed(trainer: Trainer, batch: Any, device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = trainer.step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss


def profile_steps(trainer: Trainer, batches: Sequence[Any]) -> tuple[float | None, int | None, int | None]:
    """Idle share, waits a step and launches a step; None where the profiler sees nothing (no CUPTI).

    Waits and launches are the difference of a profile of two steps and one of one step: what the profiler itself does
    at the end of a profile is in both.
    """
    one, two = (_events(trainer, [batches[0]] * count) for count in (1, 2))
    if not one.kernels or not two.kernels:
        return None, None, None
    return idle_share(two.kernels), two.waits - one.waits, len(two.kernels) - len(one.kernels)


@dataclass(slots=True)
class _Events:
    kernels: list[tuple[float, float]]  # begin and end on the device, us: kernels, copies, fills
    waits: int


def _events(trainer: Trainer, batches: Sequence[Any]) -> _Events:
    found = _Events([], 0)
    torch.cuda.synchronize()
    with suppress(RuntimeError, AssertionError):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for batch in batches:
                trainer.step(batch)
        events: Any = profile.events()
        for event in events:
            if str(event.device_type).endswith("CUDA"):
                found.kernels.append((event.time_range.start, event.time_range.end))
            elif "Synchronize" in event.name:
                found.waits += 1
    return found


def idle_share(kernels: Sequence[tuple[float, float]]) -> float:
    """The share of the time from the first begin to the last end in which none of the intervals runs."""
    ordered = sorted(kernels)
    begin = last = ordered[0][0]
    busy = 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return 1.0 - busy / (last - begin) if last > begin else 0.0
