from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.data.packing import (
    Reduction,
    collate,
    filled_tokens,
    first_of_micro_batch,
    token_weights,
)
from engine.data.planning import plan_packs
from engine.data.sample import IGNORE, Sample

SIZE = 4


def sample(name: str, length: int, targets: list[int], image: bool = False, first_id: int = 10) -> Sample:
    ids = list(range(first_id, first_id + length))
    slots = [1, 2] if image else []
    for slot in slots:
        ids[slot] = 0
    labels = [ids[j] if j in targets else IGNORE for j in range(length)]
    return Sample(name, ids, labels, f"/{name}.png" if image else None, slots, False)


def tile(value: float) -> Tensor:
    return torch.full((3, SIZE, SIZE), value)


def test_layout_of_a_pack() -> None:
    a, b = sample("a", 4, [2, 3]), sample("b", 5, [4], image=True, first_id=50)
    weights = [torch.tensor([9, 9, 0.25, 0.5]), torch.tensor([9, 9, 9, 9, 0.125])]
    pack = collate([a, b], weights, [None, tile(1.0)])
    segments = pack.segments
    assert pack.input_ids.tolist() == [0, 0, 10, 11, 12, 13, 50, 0, 0, 53, 54, *[0] * 117]
    assert segments.cu_seqlens.tolist() == [0, 1, 2, 6, 11, 128] and segments.max_seqlen == 117
    assert segments.position_ids.tolist() == [0, 0, 1, 2, 3, 4, 1, 2, 3, 4, 5, *range(117)]
    assert segments.router_row.tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, *[0] * 117]
    assert pack.modality_rows.tolist() == [0, 1]
    assert pack.image_slots.tolist() == [7, 8]
    assert pack.tile_router.tolist() == [0]
    assert pack.tiles is not None and torch.equal(pack.tiles, tile(1.0)[None])
    assert pack.supervised.tolist() == [3, 4, 9, *[0] * 125]
    assert pack.labels.tolist() == [12, 13, 54, *[0] * 125]
    assert pack.weights.tolist() == [0.25, 0.5, 0.125, *[0] * 125]
    assert pack.num_samples == 2
    dtypes = {
        torch.int64: [
            pack.input_ids, pack.modality_rows, pack.tile_router, pack.image_slots, pack.supervised, pack.labels,
        ],
        torch.int32: [segments.cu_seqlens, segments.position_ids, segments.router_row],
        torch.float32: [pack.weights, pack.tiles],
    }  # fmt: skip
    assert all(tensor.dtype == dtype for dtype, tensors in dtypes.items() for tensor in tensors)
    assert filled_tokens(pack) == 9


def test_a_full_pack_a_text_pack_and_a_pack_without_targets() -> None:
    pack = collate([sample("a", 126, [])], [torch.zeros(126)], [None])
    assert pack.input_ids.numel() == 128 and pack.segments.cu_seqlens.tolist() == [0, 1, 2, 128, 128]
    assert pack.tiles is None and pack.tile_router.numel() == pack.image_slots.numel() == 0
    assert pack.supervised.numel() == pack.labels.numel() == pack.weights.numel() == 0
    assert filled_tokens(pack) == 126
    assert collate([sample("a", 127, [])], [torch.zeros(127)], [None]).input_ids.numel() == 256


@st.composite
def steps(draw: st.DrawFn) -> list[Sample]:
    lengths = draw(st.lists(st.integers(4, 200), min_size=1, max_size=12))
    return [
        sample(
            str(n), length, draw(st.lists(st.integers(3, length - 1), max_size=6)), draw(st.booleans()), 1000 * n + 1
        )
        for n, length in enumerate(lengths)
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps(), st.sampled_from([256, 512]), st.sampled_from(get_args(Reduction)), st.integers(1, 5))
def test_packs_hold_what_the_samples_hold(
    samples: list[Sample], budget: int, reduction: Reduction, micro_batch: int
) -> None:
    weights = token_weights(samples, reduction, micro_batch)
    seen: dict[tuple[int, int], float] = {}  # (sample, target token) -> weight
    for members in plan_packs([len(s.input_ids) for s in samples], budget):
        tiles = [tile(float(i)) if samples[i].image_slots else None for i in members]
        pack = collate([samples[i] for i in members], [weights[i] for i in members], tiles)
        assert pack.input_ids.numel() % 128 == 0 and pack.labels.numel() % 128 == 0
        bounds = pack.segments.cu_seqlens.tolist()
        assert bounds[-1] == pack.input_ids.numel()
        for number, i in enumerate(members):
            start, end = bounds[2 + number], bounds[3 + number]
            assert pack.input_ids[start:end].tolist() == samples[i].input_ids
            assert pack.segments.position_ids[start:end].tolist() == list(range(1, end - start + 1))
        shown = [n for n, i in enumerate(members) if samples[i].image_slots]
        assert pack.image_slots.tolist() == [bounds[2 + n] + slot for n in shown for slot in (1, 2)]
        assert (0 if pack.tiles is None else len(pack.tiles)) == len(shown)
        assert all(pack.tiles is not None and pack.tiles[k, 0, 0, 0] == members[n] for k, n in enumerate(shown))
        rows = zip(pack.supervised.tolist(), pack.labels.tolist(), pack.weights.tolist(), strict=True)
        for row, label, weight in rows:
            if weight == 0:
                assert (row, label) == (0, 0)
                continue
            assert pack.input_ids[row + 1] == label
            segment = next(n for n in range(len(bounds) - 1) if bounds[n] <= row < bounds[n + 1])
            assert row + 1 < bounds[segment + 1] and 2 <= segment < 2 + len(members)
            seen[members[segment - 2], row + 1 - bounds[segment]] = weight
    targets = {(i, j) for i, s in enumerate(samples) for j in s.supervised}
    assert set(seen) == targets
    assert sum(seen.values()) == pytest.approx(1.0 if targets else 0.0)


def test_reductions_are_the_means_they_are_called() -> None:
    samples = [sample(str(n), 12, list(range(3, 3 + count))) for n, count in enumerate([4, 1, 0, 2, 0, 0, 3])]
    losses = [torch.rand(12, generator=torch.Generator().manual_seed(n)) for n in range(7)]

    def mean(*groups: list[int]) -> float:
        """Mean over groups of the mean over each group's targets; a group without targets does not exist."""
        flat = [torch.cat([losses[i][samples[i].supervised] for i in group]) for group in groups]
        return float(torch.stack([values.mean() for values in flat if len(values)]).mean())

    def weighted(reduction: Reduction, micro_batch: int = 1) -> float:
        weights = token_weights(samples, reduction, micro_batch)
        return float(sum((w * loss).sum() for w, loss in zip(weights, losses, strict=True)))

    assert weighted("token") == pytest.approx(mean(list(range(7))))
    assert weighted("sample") == pytest.approx(mean(*([i] for i in range(7))))
    assert weighted("micro_batch", 2) == pytest.approx(mean([0, 1], [2, 3], [4, 5], [6]))
    assert weighted("micro_batch", 1) == pytest.approx(weighted("sample"))
    assert weighted("micro_batch", 7) == pytest.approx(weighted("token"))
    assert len({weighted("token"), weighted("sample"), weighted("micro_batch", 2)}) == 3


def test_a_step_without_targets_weighs_nothing() -> None:
    weights = token_weights([sample("a", 5, []), sample("b", 5, [])], "micro_batch", 2)
    assert torch.equal(torch.stack(weights), torch.zeros(2, 5))


def test_first_of_micro_batch() -> None:
    assert first_of_micro_batch([0, 1, 2, 3], 4) == ([0, 0, 0, 0], [])
    assert first_of_micro_batch([5, 2, 7, 4], 4) == ([3, 4, 3, 3], [0])
    assert first_of_micro_batch([9, 6, 1], 1) == ([0, 1, 2], [])
    assert first_of_micro_batch([3, 5, 11], 2) == ([3, 4, 5], [2, 4, 10])


def test_legacy_router_tiles() -> None:
    """Micro-batches of three: 0 is text, 3 an image of another pack, 6 an image of this pack, 9 text elsewhere."""
    members = [0, 1, 2, 4, 6, 7, 10, 11]
    text = {0, 4, 9}
    samples = [sample(str(i), 5, [3], i not in text) for i in members]
    tiles = [None if i in text else tile(float(i)) for i in members]
    routed_by, outside = first_of_micro_batch(members, 3)
    assert outside == [3, 9]
    elsewhere = [tile(3.0), None]
    pack = collate(samples, [torch.zeros(5)] * 8, tiles, routed_by=routed_by, outside=elsewhere)
    assert pack.tiles is not None
    assert pack.tiles[:, 0, 0, 0].tolist() == [1, 2, 6, 7, 10, 11, 0]  # one tile of zeros serves 0 and 9
    assert pack.tile_router.tolist() == [6, 6, 2, 2, 6, 6, 6]
    assert pack.image_slots.numel() == 2 * 6
    members[3], tiles[3], samples[3] = 5, tile(5.0), sample("5", 5, [3], True)
    pack = collate(samples, [torch.zeros(5)] * 8, tiles, routed_by=routed_by, outside=elsewhere)
    assert pack.tiles is not None
    assert pack.tiles[:, 0, 0, 0].tolist() == [1, 2, 5, 6, 7, 10, 11, 0, 3]
    assert pack.tile_router.tolist() == [7, 7, 8, 3, 3, 7, 7, 7, 8]  # routers route themselves


def test_legacy_router_of_single_samples_is_the_default() -> None:
    samples, tiles = [sample("a", 5, [3], True), sample("b", 5, [3], True)], [tile(1.0), tile(2.0)]
    routed_by, outside = first_of_micro_batch([8, 3], 1)
    pack = collate(samples, [torch.zeros(5)] * 2, tiles, routed_by=routed_by, outside=[tile(0.0)] * len(outside))
    assert pack.tile_router.tolist() == [0, 1] and pack.tiles is not None and len(pack.tiles) == 2


def test_dummy_tile_only_where_there_is_none() -> None:
    pack = collate([sample("a", 5, [3])], [torch.zeros(5)], [None], dummy_size=SIZE)
    assert pack.tiles is not None and torch.equal(pack.tiles, torch.zeros(1, 3, SIZE, SIZE))
    assert pack.tile_router.tolist() == [0] and pack.image_slots.numel() == 0
    pack = collate([sample("a", 5, [3], True)], [torch.zeros(5)], [tile(1.0)], dummy_size=SIZE)
    assert pack.tiles is not None and torch.equal(pack.tiles, tile(1.0)[None])


def test_contradictions_are_refused() -> None:
    zeros = torch.zeros(5)
    with pytest.raises(ValueError, match="'a' has 2 image slots and no tile"):
        collate([sample("a", 5, [3], True)], [zeros], [None])
    with pytest.raises(ValueError, match="'a' has 0 image slots and a tile"):
        collate([sample("a", 5, [3])], [zeros], [tile(1.0)])
    with pytest.raises(ValueError, match="first token of sample 'a' is a target"):
        collate([sample("a", 5, [0])], [zeros], [None])
