from __future__ import annotations

import pytest

from engine.data.sampler import StepSampler
from engine.errors import DataError


def test_an_epoch_is_a_permutation_without_its_remainder() -> None:
    sampler = StepSampler(103, 10, seed=0)
    assert sampler.steps_per_epoch == 10
    epochs = [[i for step in range(e * 10, e * 10 + 10) for i in sampler.indices(step)] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 100 and set(epoch) <= set(range(103))
    assert epochs[0] != epochs[1] != epochs[2]
    assert {i for epoch in epochs for i in epoch} == set(range(103))  # what one epoch drops, another has


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int) -> list[int]:
        return StepSampler(64, 64, seed).indices(0)

    assert order(5) == order(5)
    assert len({tuple(order(seed)) for seed in (0, 1, 2, 2**32, 2**40)}) == 5
    assert StepSampler(64, 8, 5).indices(0) + StepSampler(64, 8, 5).indices(1) == order(5)[:16]


def test_any_step_at_once() -> None:
    walked = StepSampler(50, 8, seed=3)
    steps = [walked.indices(step) for step in range(40)]
    for step in (39, 0, 17, 5, 6, 38):
        assert StepSampler(50, 8, seed=3).indices(step) == steps[step]
        assert walked.indices(step) == steps[step]


def test_fewer_samples_than_a_step() -> None:
    with pytest.raises(DataError, match="has 31 samples, one step takes 32"):
        StepSampler(31, 32, seed=0)
    assert StepSampler(32, 32, seed=0).steps_per_epoch == 1
