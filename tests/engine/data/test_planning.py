from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lengths import sample_lengths
from engine.data.planning import most_tiles, plan_packs


def rows(load: int) -> int:
    return -(-(load + 2) // 128) * 128


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_plan_holds_every_sample_once_and_fits(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=16)) * ranks
    budget = data.draw(st.sampled_from([1, 128, 512, 2000, 2048, 8192]))
    tiles = [data.draw(st.sampled_from([0, 1, 1, 5])) for _ in lengths]
    room = data.draw(st.sampled_from([1, 2, 7, 100]))
    packs = plan_packs(lengths, budget, ranks, tiles=tiles, tiles_per_batch=room)
    assert len(packs) % ranks == 0
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(packs)
    capacity = max(budget, rows(max(lengths)))
    sizes = [rows(sum(lengths[i] for i in pack)) for pack in packs]
    assert max(sizes) <= capacity
    assert max(sum(tiles[i] for i in pack) for pack in packs) <= max(room, *tiles)
    assert packs == plan_packs(lengths, budget, ranks, tiles=tiles, tiles_per_batch=room)
    plain = plan_packs(lengths, budget, ranks)
    loads = [rows(sum(lengths[i] for i in pack)) for pack in plain]
    assert max(loads) - min(loads) <= max(lengths) + 256
    assert plain == plan_packs(lengths, budget, ranks, tiles=tiles, tiles_per_batch=sum(tiles) + 1)


def scienceqa_like(steps: int, samples: int = 32) -> list[list[int]]:
    """Clipped at 512 with the modality token, mean about 286, a tenth at the limit, none below 60."""
    rng = np.random.default_rng(0)
    return [np.clip(rng.gamma(2.6, 112, samples), 60, 511).astype(int).tolist() for _ in range(steps)]


def test_scienceqa_lengths_fill_packs() -> None:
    steps = scienceqa_like(100)
    lengths = np.array(steps)
    assert 270 < lengths.mean() < 300 and 0.07 < (lengths == 511).mean() < 0.15
    for budget, least, most_packs in ((2048, 0.98, 6), (4096, 0.985, 3), (8192, 0.985, 2)):
        plans = [plan_packs(step, budget) for step in steps]
        padded = sum(rows(sum(step[i] for i in p)) for step, plan in zip(steps, plans, strict=True) for p in plan)
        assert lengths.sum() / padded > least
        assert max(map(len, plans)) <= most_packs


@pytest.mark.parametrize(("budget", "least"), [(2048, 0.96), (4096, 0.975), (8192, 0.98)])
def test_packs_of_lavin_lengths_are_as_full_as_promised(budget: int, least: float) -> None:
    """The mean over 300 steps of 32 samples, half of them with an image; of each of three draws."""
    for seed in range(3):
        steps = np.array(sample_lengths(300 * 32, seed)).reshape(300, 32) - 1  # a pack has the modality tokens
        images = np.random.default_rng(seed).integers(0, 2, steps.shape)
        padded = 0
        for lengths, tiles in zip(steps.tolist(), images.tolist(), strict=True):
            plan = plan_packs(lengths, budget, tiles=tiles)
            padded += sum(rows(sum(lengths[i] for i in pack)) for pack in plan)
            assert max(sum(tiles[i] for i in pack) for pack in plan) <= most_tiles(budget) == budget // 256
        assert steps.sum() / padded >= least


def test_tiles_take_packs_of_their_own() -> None:
    assert most_tiles(100) == 1
    assert plan_packs([10] * 20, 2048, tiles=[1] * 20) == [[i for i in range(20) if i % 3 == j] for j in range(3)]
    assert len(plan_packs([10] * 20, 2048, ranks=2, tiles=[1] * 20)) == 4
    assert len(plan_packs([10] * 20, 2048, tiles=[1] * 8 + [0] * 12)) == 1
    assert len(plan_packs([10] * 4, 2048, tiles=[9, 1, 0, 0])) == 2  # nine, and no room beside them


def test_pack_count_is_the_smallest_that_fits() -> None:
    assert [len(plan_packs([520] * 32, 2048, ranks)) for ranks in (1, 2, 4, 8)] == [11, 12, 12, 16]  # three a pack
    assert len(plan_packs([511] * 32, 2048)) == 8
    assert len(plan_packs([126] * 4, 128)) == 4
    assert len(plan_packs([63] * 4, 128)) == 2
    assert len(plan_packs([100] * 8, 2048, ranks=4)) == 4


def test_a_sample_longer_than_the_budget_gets_the_room_it_needs() -> None:
    packs = plan_packs([1000, 10, 10], 256)
    assert len(packs) == 1  # and then the others find room in it too


def test_samples_that_cannot_be_spread() -> None:
    with pytest.raises(ValueError, match="tiles of 1 samples beside the lengths of 2"):
        plan_packs([5, 5], 2048, tiles=[1])
    for lengths, ranks in (([5, 5, 5], 2), ([5], 2), ([], 1), ([5, 0], 1)):
        with pytest.raises(ValueError, match="needs a positive multiple"):
            plan_packs(lengths, 2048, ranks)


def test_saving_padding_never_empties_a_pack() -> None:
    assert plan_packs([127, 127], 2048, ranks=2) == [[0], [1]]  # one pack of both would have fewer rows
