"""The clock: how long a call takes on the device, what it allocates, launches and costs the host. Needs a CUDA GPU.

* Two ceilings of the card come first, measured in the same process: the bandwidth of a large copy (bytes read and
  written) and the rate of a large bf16 matrix product, both on random data. Everything is a fraction of them.
* A sample is one pass over several sets of inputs, larger together than the L2 cache, between two events; its time is
  divided by the number of sets. Inputs are restored before each sample (many ops work in place), and the cache is
  swept by reading, which leaves nothing to be written back in the sample's time. The sweep also keeps the queue busy
  until the host has enqueued the pass, so that short kernels are not timed by the speed of the host.
* The pass is a CUDA graph. Where one variant of a case waits for the device, which no graph can hold, all variants of
  the case are called as usual instead ("stream"), so that like is compared with like.
* Variants take turns, sample by sample; each turn begins with another one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.lanes import Drawn, Lane, Program
from benchmarks.problem import Mode, normal, seeded
from kernels import unpacked

PASS_SECONDS = 4e-4  # of a sample at least: events resolve half a microsecond
MAX_SETS = 16
WARM_UP = 3
HOST_CALLS = 9


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int = 50  # samples of a variant, at most
    fewest: int = 9
    seconds: float = 2.0  # for all variants of one case in one mode, about
    profile_peers: bool = True  # count their launches too


QUICK = Effort(rounds=20, fewest=7, seconds=0.4, profile_peers=False)


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy_gbps: float
    matrix_tflops: float


@dataclass(slots=True)
class Timing:
    """What was measured of one variant in one mode. Milliseconds and bytes, as in rows.Row."""

    ms: float
    ms_q20: float
    ms_q80: float
    samples: int
    timing: str
    waits: bool
    peak_bytes: int
    extra_bytes: int
    saved_bytes: int | None
    launches: int | None
    host_us: float


@dataclass(slots=True)
class _Runner:
    """A program, and how it is run: as it is, or as replays of its graph."""

    program: Program
    before: Callable[[], object]
    timed: Callable[[], object]
    sweeps: int = 1
    ms: list[float] = field(default_factory=list)


@cache
def ceilings() -> Ceilings:
    """Of the current device; measured once a process, on a card that is warm."""
    device = torch.device("cuda")
    generator = seeded(device, 0)
    n = 8192
    left, right = normal(generator, n, n), normal(generator, n, n)
    matrix_ms = _median_ms(lambda: torch.mm(left, right))
    size = min(1 << 31, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randint(256, (size,), dtype=torch.uint8, generator=generator, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source))
    return Ceilings(copy_gbps=2 * size / copy_ms / 1e6, matrix_tflops=2 * n**3 / matrix_ms / 1e9)


def _median_ms(call: Callable[[], object], samples: int = 20) -> float:
    for _ in range(samples):
        call()
    events = []
    for _ in range(samples):
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()
        call()
        events[-1][1].record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def count_sets(bytes_of_set: int, moved: int, seconds: float, variants: int) -> int:
    """Sets that outgrow the L2 cache three times and fill a sample, as far as memory goes: results and copies of each
    variant take about twice the inputs, the copy lane the bytes that a call must have `moved` (frozen weights too)."""
    wanted, room = PASS_SECONDS / max(seconds, 1e-9), math.inf
    if touched := max(bytes_of_set, moved):
        wanted = max(wanted, 3 * _l2_bytes() / touched)
        room = torch.cuda.mem_get_info()[0] / 2 / (bytes_of_set * (2 + 2 * variants) + moved)
    return max(1, int(min(math.ceil(wanted), MAX_SETS, room)))


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size) or 1 << 26


class Clock:
    """Times lanes on the current CUDA device."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.stream = torch.cuda.Stream()
        self.sweep_buffer = torch.zeros(_l2_bytes(), device="cuda")  # fp32: four times the cache
        self.sweep_seconds = _median_ms(self.sweep_buffer.sum) / 1e3
        self.graphs_work = True  # after a capture that failed, torch 2.11's allocator takes no other, nor empty_cache

    def interleaved(self, lanes: Sequence[Lane], mode: Mode, restore: Callable[[], object]) -> dict[str, Timing | str]:
        """By variant: its timing, or why there is none. `restore` gives the sets their first values again."""
        found: dict[str, Timing | str] = {}
        torch.cuda.synchronize()
        if self.graphs_work:
            torch.cuda.empty_cache()
        with torch.cuda.stream(self.stream):
            waits: dict[str, bool] = {}
            programs = []
            for lane in lanes:
                program = Program(lane, mode, lane.drawn)
                try:
                    waits[lane.variant.name] = self._warm_up(program, restore)
                    programs.append(program)
                except Exception as error:  # of any kind: a peer's, or ours on this card
                    found[lane.variant.name] = reason(error)
            as_graph = self.graphs_work and not any(waits.values())
            try:
                runners = [self._runner(program, as_graph) for program in programs]
            except RuntimeError:
                if not as_graph:
                    raise
                self.graphs_work = False
                return self.interleaved(lanes, mode, restore)
            self._take_turns(runners, restore)
            for runner in runners:
                name = runner.program.lane.variant.name
                found[name] = self._summary(runner, "graph" if as_graph else "stream", waits[name], mode)
        torch.cuda.synchronize()
        return found

    def _warm_up(self, program: Program, restore: Callable[[], object]) -> bool:
        """Compiles what compiles at the first call; returns whether the host waits for the device in a call."""
        for _ in range(WARM_UP):
            restore()
            program.before()
            program.timed()
        torch.cuda.synchronize()
        restore()
        torch.cuda.set_sync_debug_mode("error")
        try:
            program.before()
            program.timed()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def _runner(self, program: Program, as_graph: bool) -> _Runner:
        runner = _Runner(program, program.before, program.timed)
        program.before()
        if as_graph:
            first = self._capture(program.before, None) if program.mode == "backward" else None
            second = self._capture(program.timed, first)
            runner.before, runner.timed = (first.replay if first else _nothing), second.replay
        runner.before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        runner.timed()
        runner.sweeps = 1 + math.ceil(1.5 * (time.perf_counter() - start) / self.sweep_seconds)
        torch.cuda.synchronize()
        return runner

    def _capture(self, function: Callable[[], object], after: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
        unpacked.forget()  # what another graph has unpacked is not there when this one runs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=None if after is None else after.pool(), stream=self.stream):
            function()
        return graph

    def _take_turns(self, runners: list[_Runner], restore: Callable[[], object]) -> None:
        rounds, done, began = self.effort.rounds, 0, time.perf_counter()
        while runners and done < rounds:
            first = done % len(runners)
            samples = [(runner, self._sample(runner, restore)) for runner in runners[first:] + runners[:first]]
            torch.cuda.synchronize()
            for runner, (start, end) in samples:
                runner.ms.append(start.elapsed_time(end) / len(runner.program.drawn))
            done += 1
            if done >= self.effort.fewest and time.perf_counter() - began > self.effort.seconds:
                break

    def _sample(self, runner: _Runner, restore: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        restore()
        runner.before()
        for _ in range(runner.sweeps):
            self.sweep_buffer.sum()
        start.record()
        runner.timed()
        end.record()
        return start, end

    def _summary(self, runner: _Runner, timing: str, waits: bool, mode: Mode) -> Timing:
        low, *_, high = statistics.quantiles(runner.ms, n=5, method="inclusive")
        lane = runner.program.lane
        single = Program(lane, mode, lane.drawn[:1])
        peak, extra, saved = _memory(single)
        launches = _launches(single) if lane.variant.is_ours or self.effort.profile_peers else None
        return Timing(
            ms=statistics.median(runner.ms), ms_q20=low, ms_q80=high, samples=len(runner.ms), timing=timing,
            waits=waits, peak_bytes=peak, extra_bytes=extra, saved_bytes=saved if single.mode == "forward" else None,
            launches=launches, host_us=_host_us(single),
        )  # fmt: skip


def _memory(program: Program) -> tuple[int, int, int]:
    """Bytes that one call adds at its peak; those of them beside results and saved tensors; those that stay saved.

    As requested, before the allocator rounds them.
    """
    program.before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    given = _requested("current")
    old = _storages([x for drawn in program.drawn for x in drawn.tensors()])
    program.timed()
    torch.cuda.synchronize()
    peak, stays = _requested("peak") - given, _requested("current") - given
    results = sum(size for key, size in _storages(program.kept()).items() if key not in old)
    saved = max(0, stays - results)
    program.before()
    return peak, max(0, peak - results - saved), saved


def _requested(which: str) -> int:
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}


def _launches(program: Program) -> int | None:
    """Kernels, copies and fills of one call, counted by the profiler; None where it sees none (no CUPTI)."""
    program.before()
    torch.cuda.synchronize()
    count = 0
    with suppress(RuntimeError, AssertionError):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            program.timed()
            torch.cuda.synchronize()
        events: Any = profile.events()
        count = sum(str(event.device_type).endswith("CUDA") for event in events)
    return count or None


def _host_us(program: Program) -> float:
    """Median microseconds until a call returns, from an empty queue."""
    spent = []
    for _ in range(HOST_CALLS):
        program.before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        program.timed()
        spent.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    program.before()
    return statistics.median(spent)


def restorer(drawn: Sequence[Drawn], arranged: Sequence[Drawn]) -> Callable[[], object]:
    """A function that gives every tensor its present value again: those of the sets `drawn`, and what variants made of
    them. A tensor that is the same in all sets is a frozen weight, which nobody changes."""
    shared = [{id(x) for x in s.tensors()} for s in drawn]
    frozen = set.intersection(*shared) if len(shared) > 1 else set()
    unique = {id(x): x.detach() for s in [*drawn, *arranged] for x in s.tensors()}
    live = [x for key, x in unique.items() if key not in frozen]
    first = [x.clone() for x in live]

    def restore() -> None:
        if live:
            with torch.no_grad():
                torch._foreach_copy_(live, first)

    return restore


def reason(error: BaseException) -> str:
    """One line about an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _nothing() -> None:
    return None
