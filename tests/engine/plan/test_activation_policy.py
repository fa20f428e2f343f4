"""The choice of what layers keep is the best one: compared with every assignment, in every order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.plan.activation_policy import Choice, Layers, Solution, solve
from models.recompute import POLICIES, Policy

SIZES = [(1, 0), (0, 3), (2, 2), (3, 3), (1, 5), (4, 2), (6, 0), (2, 4)]


def random_stage(rng: np.random.Generator, count: int, *, plausible: bool) -> Layers:
    """plausible: who keeps less, takes longer. Otherwise anything, policies that are missing too. Whole numbers."""
    kept = rng.integers(0, 40, 3)
    seconds = rng.integers(0, 8, 3).astype(float)
    if plausible:
        kept, seconds = np.sort(kept)[::-1], np.sort(seconds)
    known = POLICIES if plausible else [p for p in POLICIES if rng.random() < 0.8] or POLICIES[:1]
    choices: dict[Policy, Choice] = {
        policy: Choice(int(kept[i]), int(kept[i] + rng.integers(0, 60)), seconds[i])
        for i, policy in enumerate(POLICIES)
        if policy in known
    }
    return Layers(count, choices)


def peak_and_seconds(stages: Sequence[Layers], policies: Sequence[Sequence[Policy]], after: int) -> tuple[int, float]:
    """By walking through the layers."""
    alive, peak, seconds = 0, 0, 0.0
    for stage, chosen in zip(stages, policies, strict=True):
        for policy in chosen:
            choice = stage.choices[policy]
            peak = max(peak, alive + choice.peak)
            alive += choice.saved
            seconds += choice.seconds
    return max(peak, alive + after), seconds


def assignments(stages: Sequence[Layers]) -> Iterator[tuple[tuple[Policy, ...], ...]]:
    return itertools.product(*(itertools.product(stage.choices, repeat=stage.count) for stage in stages))


def assert_best(stages: Sequence[Layers], after: int, budget: int, every: Sequence[tuple[int, float]]) -> Solution:
    found = solve(stages, after, budget)
    assert [len(chosen) for chosen in found.policies] == [stage.count for stage in stages]
    assert peak_and_seconds(stages, found.policies, after) == (found.peak, found.seconds)
    fitting = [(seconds, peak) for peak, seconds in every if peak <= budget]
    assert found.fits == bool(fitting)
    if fitting:
        assert (found.seconds, found.peak) == min(fitting)
    else:
        assert (found.peak, found.seconds) == min(every)
    return found


@pytest.mark.parametrize("plausible", [True, False])
def test_it_is_the_best_of_all_assignments(plausible: bool) -> None:
    rng = np.random.default_rng(3)
    fitted = 0
    for size in SIZES * 12:
        stages = [random_stage(rng, count, plausible=plausible) for count in size]
        after = int(rng.integers(0, 80))
        every = [peak_and_seconds(stages, policies, after) for policies in assignments(stages)]
        peaks = sorted({peak for peak, _ in every})
        for budget in (peaks[0] - 1, peaks[0], *rng.choice(peaks, 2).tolist(), peaks[-1]):
            fitted += assert_best(stages, after, int(budget), every).fits
    assert fitted > 300


def test_the_order_within_a_stage_matters_and_is_the_best() -> None:
    """A layer that is dear to recompute comes first, where nothing lies below it yet."""
    layers = Layers(2, {"save_all": Choice(10, 12, 0.0), "keep_input": Choice(1, 30, 1.0)})
    found = solve([layers], 20, 31)
    assert found.policies == (("keep_input", "save_all"),)
    assert (found.peak, found.seconds, found.fits) == (31, 1.0, True)
    assert peak_and_seconds([layers], [("save_all", "keep_input")], 20) == (40, 1.0)


@pytest.mark.parametrize("forward", [False, True])
def test_what_is_handed_on_and_a_dearer_last_layer_count_exactly(forward: bool) -> None:
    """The peak is that of a walk through the layers; without what forward passes need it is the best of all orders."""
    rng = np.random.default_rng(5)
    for size in [(3, 3), (1, 4), (4, 1), (0, 2)] * 15:
        stages = []
        for count in size:
            stage, dearer = random_stage(rng, count, plausible=True), int(rng.integers(0, 12))
            choices = {
                policy: replace(
                    choice, peak=choice.peak + dearer, inner=choice.peak, handed=forward * int(rng.integers(0, 9)),
                    forward=forward * (choice.saved + int(rng.integers(0, 60))),
                )
                for policy, choice in stage.choices.items()
            }  # fmt: skip
            stages.append(Layers(count, choices, forward * int(rng.integers(0, 9))))
        every: dict[tuple[tuple[Policy, ...], ...], int] = {}
        for policies in assignments(stages):
            first, second = (stage.saved(chosen) for stage, chosen in zip(stages, policies, strict=True))
            in_second = first + stages[1].peak(policies[1])
            every[policies] = max(stages[0].peak(policies[0]), in_second, first + second + 30)
        for budget in (0, *rng.choice(list(every.values()), 3).tolist()):
            found = solve(stages, 30, budget)
            assert found.peak == every[found.policies]
            assert found.fits == (found.peak <= budget)
            if not forward:
                assert found.fits == (min(every.values()) <= budget)
        if not forward:
            assert solve(stages, 30, 0).peak == min(every.values())


def test_equal_times_are_equal_on_every_machine() -> None:
    """0.1 + 0.2 is not 0.3 in floating point; of two choices that take as long, that of the lower peak is taken."""
    first = Layers(1, {"save_all": Choice(0, 9, 0.1), "keep_input": Choice(0, 5, 0.3)})
    second = Layers(1, {"save_all": Choice(0, 9, 0.2), "keep_input": Choice(0, 5, 0.0)})
    found = solve([first, second], 0, 9)
    assert found.policies == (("save_all",), ("keep_input",)) and found.seconds == 0.1
    third = Layers(1, {"save_all": Choice(0, 9, 0.1 + 0.2), "keep_input": Choice(0, 5, 0.3)})
    assert solve([third], 0, 9).policies == (("keep_input",),)


def test_a_sufficient_budget_recomputes_nothing_and_none_at_all_is_said() -> None:
    layers = Layers(
        5, {"save_all": Choice(10, 15, 0.0), "recompute_mlp": Choice(6, 15, 1.0), "keep_input": Choice(1, 15, 2.0)}
    )
    assert solve([layers, layers], 7, 107).policies == (("save_all",) * 5,) * 2
    least = solve([layers, layers], 7, 0)
    assert not least.fits and least.peak == 24
    assert least.policies == (("keep_input",) * 5, ("keep_input",) * 4 + ("recompute_mlp",))  # where nothing follows
    assert solve([layers, layers], 7, 24).fits


def test_the_choice_is_the_same_each_time() -> None:
    """The size of LLaMA-13B with ViT-L/14."""
    language = Layers(
        40,
        {
            "save_all": Choice(239_423_488, 400_000_000, 0.0),
            "recompute_mlp": Choice(126_156_800, 410_000_000, 1e-3),
            "keep_input": Choice(20_971_520, 500_000_000, 2e-3),
        },
    )
    tower = Layers(
        24,
        {
            "save_all": Choice(58_000_000, 90_000_000, 0.0),
            "recompute_mlp": Choice(40_000_000, 91_000_000, 1e-4),
            "keep_input": Choice(4_000_000, 110_000_000, 3e-4),
        },
    )
    found = [solve([tower, language], 10**9, budget) for budget in (5 * 10**9, 5 * 10**9, 10**10)]
    assert found[0] == found[1] and found[0].fits and found[0].seconds > found[2].seconds > 0


def test_where_nothing_is_gained_everything_is_kept() -> None:
    """A frozen tower keeps nothing, whatever its policy is called: the one that is printed is the plain one."""
    frozen = Layers(4, {policy: Choice(0, 30, 0.0) for policy in reversed(POLICIES)})
    trained = Layers(2, {"save_all": Choice(20, 25, 0.0), "keep_input": Choice(5, 40, 1.0)})
    for budget in (0, 60, 1000):
        assert solve([frozen, trained], 10, budget).policies[0] == ("save_all",) * 4
