"""What makes a goal met, missed or not measured, and that the benchmarks have the cases that the goals look at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import suite
from benchmarks.conditions import Condition, Goal, judge
from benchmarks.goals import GOALS
from benchmarks.problem import Yardstick
from tests.benchmarks.made_up_rows import all_fulfilling, fulfilling, row, shape

CASES = ("T=1 D=8", "T=2 D=8")
FASTER = Condition("times liger", "rope", "full", CASES, ">=", 2.0, peer="liger")
FRACTION = Condition("of the card's rate", "rope", "forward", CASES, ">=", 0.9, field="fraction")

measurable = pytest.mark.parametrize("goal", [goal for goal in GOALS if goal.conditions], ids=lambda goal: goal.id)


def test_all_goals_are_there_in_order() -> None:
    assert [goal.id for goal in GOALS] == [f"G{i}" for i in range(1, 24)]
    assert all(goal.conditions or goal.needs for goal in GOALS)


@measurable
def test_the_benchmarks_have_the_goals_cases(goal: Goal) -> None:
    for condition in goal.conditions:
        cases = {case.name: case for case in suite.part(condition.bench).cases()}
        for name in condition.cases:
            assert name in cases, f"{goal.id}: benchmarks/{condition.bench}.py has no case {name!r}"
            assert condition.mode in cases[name].modes, f"{goal.id}: {name} is not measured in mode {condition.mode}"
            assert cases[name].quick, f"{goal.id}: --quick leaves {name} out"


@measurable
def test_the_benchmarks_have_the_goals_variants(goal: Goal) -> None:
    for condition in goal.conditions:
        bench = suite.part(condition.bench)
        case = next(case for case in bench.cases() if case.name == condition.cases[0])
        if isinstance(bench, Yardstick):
            assert {condition.ours, condition.peer or condition.ours} <= set(bench.variants(case)), goal.id
            continue
        tiny = replace(case, shape={**case.shape, **bench.tiny})
        problem = bench.problem(tiny, torch.device("cpu"))
        quick = {variant.name for variant in problem.variants if variant.quick}
        quick |= {"copy"} if problem.cost[condition.mode].bytes else set()  # type: ignore[index]
        assert {condition.ours, condition.peer or condition.ours} <= quick, goal.id


@measurable
def test_a_goal_is_met_when_all_its_conditions_hold(goal: Goal) -> None:
    verdict = judge(goal, all_fulfilling(goal))
    assert verdict.status == ("not_measured" if goal.needs else "met"), verdict.measured
    assert verdict.rows and verdict.measured


@measurable
def test_a_goal_is_missed_when_one_condition_fails(goal: Goal) -> None:
    for condition in goal.conditions:
        bad = {"fraction": 0.0, "ms": 1e6, "error": 1.0, "launches": 9, "extra_bytes": 10**12, "peak_bytes": 1}
        bad |= {"saved_bytes": 1000, "samples_per_s": 1.0, "allocated_bytes": 10**12, "idle": 0.5, "syncs": 9}
        bad |= {"efficiency": 0.5}
        slow = [
            replace(one, **{condition.field: bad[condition.field]}) if one.variant == condition.ours else one
            for one in all_fulfilling(goal)
            if (one.bench, one.mode) == (condition.bench, condition.mode)
        ]
        rest = [one for one in all_fulfilling(goal) if (one.bench, one.mode) != (condition.bench, condition.mode)]
        assert judge(goal, [*slow, *rest]).status == "missed", condition.text


@measurable
def test_a_goal_is_not_measured_while_a_row_is_missing(goal: Goal) -> None:
    gone = all_fulfilling(goal)[-1]
    key = (gone.bench, gone.name, gone.mode, gone.variant)
    left = [one for one in all_fulfilling(goal) if (one.bench, one.name, one.mode, one.variant) != key]
    verdict = judge(goal, left)
    assert verdict.status == "not_measured"
    assert verdict.measured is None or f"no row of {gone.variant} at {gone.name}" in verdict.measured


def test_nothing_is_measured_without_rows() -> None:
    assert {judge(goal, []).status for goal in GOALS} == {"not_measured"}
    assert {judge(goal, []).measured for goal in GOALS} == {None}


def test_the_worst_case_is_shown() -> None:
    rows = [*fulfilling(FRACTION)]
    rows[1] = replace(rows[1], fraction=0.5)
    verdict = judge(Goal("G0", "made up", (FRACTION,)), rows)
    assert (verdict.status, verdict.measured) == ("missed", "of the card's rate 0.5 (T=2 D=8)")
    assert verdict.rows == rows


def test_a_failed_condition_is_told_although_another_is_not_measured() -> None:
    slow = [replace(one, fraction=0.1) for one in fulfilling(FRACTION)]
    verdict = judge(Goal("G0", "made up", (FRACTION, FASTER)), slow)
    assert verdict.status == "missed"
    assert verdict.measured == "of the card's rate 0.1 (T=1 D=8); times liger: no row of nibble at T=1 D=8 and 1 more"


def test_a_kernel_that_is_wrong_misses_its_goal() -> None:
    rows = fulfilling(FASTER)
    rows[0] = row("rope", shape(CASES[0]), None, failure="Wrong: relative error 0.5, allowed 0.02")
    verdict = judge(Goal("G0", "made up", (FASTER,)), rows)
    assert verdict.status == "missed" and "nibble failed at T=1 D=8 (Wrong: relative error 0.5" in verdict.measured


def test_a_peer_that_is_not_installed_leaves_the_goal_unmeasured_and_says_why() -> None:
    rows = [one for one in fulfilling(FASTER) if one.variant == "nibble"]
    rows += [row("rope", shape(case), None, variant="liger", failure="no module liger_kernel") for case in CASES]
    verdict = judge(Goal("G0", "made up", (FASTER,)), rows)
    assert verdict.status == "not_measured"
    assert verdict.measured == "times liger: no row of liger at T=1 D=8 (no module liger_kernel) and 1 more"


def test_the_forty_microseconds_are_for_a_size_that_a_copy_can_do() -> None:
    """4 to 5 M parameters: LaVIN-13B's 172 MB take as long at an H200's 4.3 TB/s."""
    (goal,) = (goal for goal in GOALS if goal.id == "G12")
    (limit,) = (condition for condition in goal.conditions if not condition.peer)
    sizes = [case.shape["N"] for case in suite.bench("adamw").cases() if case.name in limit.cases]
    assert sizes and all(32 * size / 4.3e12 < 40e-6 for size in sizes)


def test_a_geometric_mean_balances_cases() -> None:
    rows = fulfilling(FASTER)
    peers = [one for one in rows if one.variant == "liger"]
    ours = [one for one in rows if one.variant == "nibble"]
    mixed = [*(replace(one, ms=1.0) for one in ours), replace(peers[0], ms=1.6), replace(peers[1], ms=2.5)]
    assert judge(Goal("G0", "made up", (FASTER,)), mixed).status == "missed"
    verdict = judge(Goal("G0", "made up", (replace(FASTER, geomean=True),)), mixed)
    assert (verdict.status, verdict.measured) == ("met", "times liger 2 (geometric mean of 2)")


def test_a_limit_divides_the_other_way() -> None:
    limit = replace(FASTER, sense="<=", bound=1.25)
    ours, peer = row(ms=1.2), row(ms=1.0, variant="gemms")
    assert limit.figure(ours, peer) == 1.2 and FASTER.figure(ours, peer) == pytest.approx(1 / 1.2)
    assert limit.text == "times liger <= 1.25"
