"""What the clock of whole steps makes of trainers, and the yardsticks of packing and of loss curves at toy size."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import packing, parity, report, whole_steps
from benchmarks.lavin_lite import LavinTrainer
from benchmarks.problem import Yardstick
from benchmarks.rows import Row, parse
from benchmarks.whole_steps import Entrant, Steps, busy_time, measure_steps, profile_steps
from benchmarks.workload import Workload, workload
from tests.benchmarks.made_up_rows import ORIGIN, row

CPU = torch.device("cpu")


class Sleeper:
    """A trainer that only notes what it is given."""

    warm_ups, borrowed_bytes = 2, 0

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def prepare(self, work: Workload) -> int:
        return len(work.samples)

    def step(self, batch: Any) -> float:
        self.log.append(f"{self.name}{batch}")
        return 1.0

    def launched(self) -> str:
        return f"{len(self.log)} steps"


WORKS = [workload(2, 96, 28, longest=64)]


def measured(
    entrants: Sequence[Entrant], works: Sequence[Workload] = WORKS, device: torch.device = CPU, rounds: int = 2
) -> dict[str, Steps | str]:
    """By name, in the order in which they are told."""
    return {entrant.name: steps for entrant, steps in measure_steps(entrants, works, device, rounds)}


def tiny_rows(yardstick: Yardstick, number: int = 0, **shape: Any) -> list[Row]:
    case = yardstick.cases()[number]
    rows = list(yardstick.rows(replace(case, shape={**case.shape, **yardstick.tiny, **shape}), CPU, ORIGIN, True))
    assert [row.variant for row in rows] == list(yardstick.variants(case))
    for one in rows:
        assert parse(one.flat()) == one and one.failure is None and one.mode == "step"
    return rows


def test_trainers_are_warm_and_take_turns_on_the_same_samples() -> None:
    log: list[str] = []
    works = [workload(count, 96, 28, longest=64) for count in (2, 3)]
    entrants = [Entrant(name, lambda name=name: Sleeper(name, log)) for name in "ab"]  # type: ignore[misc]
    found = measured(entrants, works, rounds=3)
    warm = ["a2", "a3"] * 2 + ["b2", "b3"] * 2
    assert log == [*warm, "a2", "b2", "b3", "a3", "a2", "b2"]
    assert all(isinstance(steps, Steps) and len(steps.seconds) == 3 for steps in found.values())


def test_a_trainer_that_fails_does_not_stop_the_others() -> None:
    def broken() -> Sleeper:
        raise RuntimeError("out of memory\nand more")

    found = measured([Entrant("a", broken), Entrant("b", lambda: Sleeper("b", []))])
    assert found["a"] == "RuntimeError: out of memory" and isinstance(found["b"], Steps)
    assert found["b"].launched == "4 steps"


@pytest.mark.parametrize("last", [2, 3, 5])
def test_a_trainer_that_fails_at_any_step_does_not_stop_the_others(last: int) -> None:
    """While it warms up, in the first round and in the third."""

    class Tired(Sleeper):
        def step(self, batch: Any) -> float:
            super().step(batch)
            if len(self.log) == last:
                raise RuntimeError("out of memory")
            return 1.0

    log: list[str] = []
    found = measured([Entrant("a", lambda: Tired("a", [])), Entrant("b", lambda: Sleeper("b", log))], rounds=3)
    assert found["a"] == "RuntimeError: out of memory"
    assert isinstance(found["b"], Steps) and len(found["b"].seconds) == 3 and len(log) == 5


def test_a_round_that_is_not_finite_is_no_time_either() -> None:
    """Such a step of ours leaves the update out."""
    losses = iter([1.0, 1.0, 1.0, float("inf")])
    broken = Sleeper("a", [])
    broken.step = lambda batch: next(losses)  # type: ignore[method-assign]
    assert "the loss is inf" in str(measured([Entrant("a", lambda: broken)])["a"])


def test_what_is_known_is_told_before_anything_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that fails, or ends the process, loses nobody's times."""

    def failing(trainer: Sleeper, batches: object) -> None:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    class Cuda:
        """Of torch, where there is none."""

        def __getattr__(self, name: str) -> Any:
            return lambda *_: (10, 20) if name == "mem_get_info" else 0

    monkeypatch.setattr(whole_steps, "profile_steps", failing)
    monkeypatch.setattr(whole_steps, "device_is_lost", lambda: False)
    monkeypatch.setattr(torch, "cuda", Cuda())
    entrants = [Entrant(name, lambda: Sleeper("a", []), profiled=name == "ours") for name in ("ours", "peer")]
    found = measured(entrants, device=torch.device("cuda:0"))
    assert list(found) == ["peer", "ours"]
    ours = found["ours"]
    assert isinstance(ours, Steps) and len(ours.seconds) == 2 and ours.idle is None and ours.device_bytes == 10


def test_a_loss_that_is_not_finite_is_no_time() -> None:
    broken = Sleeper("a", [])
    broken.step = lambda batch: float("nan")  # type: ignore[method-assign]
    assert "the loss is nan" in str(measured([Entrant("a", lambda: broken)])["a"])


def test_what_the_profiler_does_itself_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Profile:
        """Two kernels of 4 us and a wait every 10 us for each step; another wait when it ends."""

        def __init__(self, activities: object) -> None:
            self.before = len(log)

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            self.steps = len(log) - self.before

        def events(self) -> list[SimpleNamespace]:
            def event(device: str, name: str, start: float) -> SimpleNamespace:
                return SimpleNamespace(
                    device_type=device, name=name, time_range=SimpleNamespace(start=start, end=start + 4)
                )

            of_steps = [
                event(device, name, 10.0 * step + at)
                for step in range(self.steps)
                for device, name, at in (
                    ("DeviceType.CUDA", "a", 0), ("DeviceType.CUDA", "b", 6),
                    ("DeviceType.CPU", "cudaStreamSynchronize", 8),
                )
            ]  # fmt: skip
            return [*of_steps, event("DeviceType.CPU", "cudaDeviceSynchronize", 99.0)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = iter([0.0, 10e-6, 0.0, 20e-6])  # of one step, of two
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = profile_steps(Sleeper("a", log), [2])
    assert found is not None
    idle, busy, waits, launches = found
    assert (idle, busy, waits, launches) == (pytest.approx(0.2), pytest.approx(8e-3), 1, 2)


@pytest.mark.parametrize(
    ("kernels", "busy"),
    [
        ([(0.0, 10.0)], 10.0),
        ([(0.0, 4.0), (6.0, 10.0)], 8.0),
        ([(6.0, 10.0), (0.0, 4.0)], 8.0),
        ([(0.0, 8.0), (2.0, 4.0), (3.0, 5.0), (9.0, 10.0)], 9.0),  # streams that overlap
        ([(5.0, 5.0)], 0.0),
    ],
)
def test_the_device_is_busy_while_anything_runs(kernels: list[tuple[float, float]], busy: float) -> None:
    assert busy_time(kernels) == pytest.approx(busy)


def test_packs_are_full_and_lose_nothing() -> None:
    for number in range(len(packing.cases())):
        (one,) = tiny_rows(packing.YARDSTICK, number)
        assert 0.98 <= (one.efficiency or 0) < 1
        assert one.error is not None and one.error < 1e-5


def test_the_curves_are_the_same_where_nothing_is_random() -> None:
    ours, noise = tiny_rows(parity.YARDSTICK, 1, steps=3)
    assert ours.case["dropout"] == 0.0
    assert ours.error is not None and ours.error < 1e-5
    assert noise.error is not None and noise.error < 1e-5 and noise.package is not None


def test_without_bitsandbytes_there_is_no_curve_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    case = parity.cases()[0]
    tiny = replace(case, shape={**case.shape, **parity.YARDSTICK.tiny})
    (one,) = parity.YARDSTICK.rows(tiny, CPU, ORIGIN, True)
    assert one.variant == "noise" and "bitsandbytes" in str(one.failure)


def test_plain_runs_that_fail_are_not_held_against_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object, batch: object) -> float:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(LavinTrainer, "step", failing)
    case = parity.cases()[0]
    tiny = replace(case, shape={**case.shape, **parity.YARDSTICK.tiny})
    (one,) = parity.YARDSTICK.rows(tiny, CPU, ORIGIN, True)
    assert (one.variant, one.failure) == ("noise", "RuntimeError: no kernel image is available")


def test_the_distance_from_runs_is_told_in_their_noise() -> None:
    curves = [[10.0, 8.0], [10.2, 8.0], [9.8, 8.0]]
    assert parity.distance([10.0, 8.0], curves) == 0.0
    assert parity.distance([10.3, 8.4], curves) == pytest.approx(((0.3**2 + 0.4**2) / 2) ** 0.5 / 9)
    assert parity.noise(curves) == pytest.approx((0.2**2 / 2) ** 0.5 / 9)


def test_the_report_shows_speed_memory_and_the_plan() -> None:
    rows = [
        row(
            "end_to_end", {"model": "7B"}, "step", timing="steps", samples_per_s=60.0, tokens_per_s=17000.0,
            fraction=0.61, allocated_bytes=8 * 2**30, device_bytes=9 * 2**30, idle=0.012, syncs=1,
            plan_bytes=7 * 2**30, plan_tokens_per_s=18000.0, policy="language: save_all x 32",
        ),
        row("end_to_end", {"model": "7B"}, "step", variant="hf_peft", timing="steps", samples_per_s=20.0),
    ]  # fmt: skip
    text = report.render(rows, {})["README.md"]
    assert (
        "| model=7B | nibble | 60.00 | 17,000 (plan 18,000) | 61.0% | 8.00 (plan 7.00) | 9.00 | 1.2% | 1 | "
        "language: save_all x 32 |"
    ) in text
    assert "| model=7B | hf_peft | 20.00 |" in text
