"""Packs of models without modality tokens, of images in several tiles, and of tiles with many tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.data.anyres import Anyres
from engine.data.packing import PackForm, collate, filled_tokens, token_weights
from engine.data.padding import pad, padded_tiles
from engine.data.planning import own_rows, plan_packs, round_up
from engine.data.sample import IGNORE, NEWLINE, Sample
from models.pack import Pack

K, SIZE = 4, 4
PLAIN = PackForm(modality=False, tile_tokens=K)
MERGED = PackForm(modality=False, tile_tokens=K, newline=True)
ANYRES = Anyres(tile=SIZE, tokens=K, merge="spatial_unpad")


def sample(name: str, length: int, size: tuple[int, int] | None = None) -> Sample:
    """A sample of text, or with a picture of this size cut by ANYRES."""
    tokens = None if size is None else ANYRES.of(size)
    count = 0 if tokens is None else tokens.count
    ids = [7, *[0] * count, *range(10, 10 + length)]
    labels = [IGNORE] * (1 + count) + ids[1 + count :]
    image = None if size is None else f"/{name}.png"
    return Sample(name, ids, labels, image, list(range(1, 1 + count)), False, 1 if tokens is None else tokens.num_tiles,
                  None if tokens is None else tokens.rows)  # fmt: skip


def tiles_of(one: Sample, value: float) -> Tensor | None:
    if not one.tiles:
        return None
    return torch.stack([torch.full((3, SIZE, SIZE), value + n / 10) for n in range(one.tiles)])


def packed(samples: list[Sample], form: PackForm, **options: int) -> Pack:
    tiles = [tiles_of(one, float(n)) for n, one in enumerate(samples)]
    return collate(samples, token_weights(samples, "token"), tiles, form=form, **options)  # type: ignore[arg-type]


def test_without_modality_tokens_samples_begin_at_row_and_position_zero() -> None:
    pack = packed([sample("a", 3), sample("b", 5)], PLAIN)
    segments = pack.segments
    assert pack.input_ids[:10].tolist() == [7, 10, 11, 12, 7, 10, 11, 12, 13, 14]
    assert segments.cu_seqlens.tolist() == [0, 4, 10, 128]
    assert segments.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, *range(118)]
    assert pack.modality_rows.dtype == torch.int64 and pack.modality_rows.tolist() == []
    assert pack.supervised[:8].tolist() == [0, 1, 2, 4, 5, 6, 7, 8] and filled_tokens(pack) == 10
    assert pack.image_rows is None


@pytest.mark.parametrize(("length", "total"), [(126, 128), (127, 256)])
def test_a_row_behind_the_samples_is_always_free(length: int, total: int) -> None:
    pack = packed([sample("a", length)], PLAIN)
    assert pack.input_ids.numel() == total and int(pack.segments.cu_seqlens[-2]) < total
    assert own_rows(modality=False) == 1 and own_rows(modality=True) == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=16), st.sampled_from([256, 512]))
def test_plans_without_modality_rows(lengths: list[int], budget: int) -> None:
    plan = plan_packs(lengths, budget, modality=False)
    assert sorted(i for pack in plan for i in pack) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in pack) for pack in plan]
    assert max(round_up(1 + load) for load in loads) <= max(budget, round_up(1 + max(lengths)))


def test_several_tiles_and_the_rows_of_their_tokens() -> None:
    """Two pictures of three tiles and a text between them: the second's tokens count from its own tiles on."""
    first, second = sample("a", 2, (4, 8)), sample("c", 2, (8, 4))
    pack = packed([first, sample("b", 3), second], MERGED)
    assert pack.tiles is not None and pack.tiles.shape == (6, 3, SIZE, SIZE)
    assert pack.tiles[:, 0, 0, 0].tolist() == pytest.approx([0, 0.1, 0.2, 2, 2.1, 2.2])
    assert pack.tile_router.tolist() == list(range(6))
    newline = 6 * K
    assert first.image_rows is not None and second.image_rows is not None and pack.image_rows is not None
    expected = [newline if r == NEWLINE else r for r in first.image_rows]
    expected += [newline if r == NEWLINE else 3 * K + r for r in second.image_rows]
    assert pack.image_rows.tolist() == expected and newline in expected
    start = len(first.input_ids) + 4
    assert pack.image_slots.tolist() == [*first.image_slots, *(start + slot for slot in second.image_slots)]


def test_a_model_with_a_newline_always_gathers() -> None:
    """Its newline learns in every pack, on every rank; an image of one tile is in order."""
    text = packed([sample("a", 3)], MERGED, dummy_size=SIZE)
    assert text.image_rows is not None and text.image_rows.numel() == 0 and text.tiles is not None
    one = Sample("b", [7, 0, 0, 0, 0, 9], [IGNORE] * 5 + [9], "/b.png", [1, 2, 3, 4], False)
    found = packed([one, one], MERGED).image_rows
    assert found is not None and found.tolist() == list(range(8))
    with pytest.raises(ValueError, match="taken in order"):
        collate([one], [torch.zeros(6)], [None], table_rows=[3], form=MERGED)


def test_the_first_tile_routes_where_a_batchs_first_sample_does() -> None:
    samples = [sample("a", 2, (4, 8)), sample("b", 2, (8, 4))]
    tiles = [tiles_of(one, float(n)) for n, one in enumerate(samples)]
    weights = [torch.zeros(len(s.input_ids)) for s in samples]
    inside = collate(samples, weights, tiles, routed_by=[0, 0], form=PLAIN)
    assert inside.tile_router.tolist() == [0] * 6
    outside = collate(samples, weights, tiles, routed_by=[2, 2], outside=[torch.ones(3, SIZE, SIZE)], form=PLAIN)
    assert outside.tile_router.tolist() == [6] * 7 and outside.tiles is not None and len(outside.tiles) == 7


def embedded(pack: Pack) -> np.ndarray:
    """Which embedding each row of a pack ends with: its id, or 1000 + the row of an image's, or 5000 the newline's."""
    rows = pack.input_ids.numpy().copy()
    count = 0 if pack.tiles is None else len(pack.tiles) * K
    source = np.arange(pack.image_slots.numel()) if pack.image_rows is None else pack.image_rows.numpy()
    rows[pack.image_slots.numpy()] = np.where(source == count, 5000, 1000 + source)
    return rows


@pytest.mark.parametrize("form", [PLAIN, MERGED], ids=["in order", "gathered"])
def test_what_is_added_is_behind_all_samples(form: PackForm) -> None:
    single = [Sample(str(n), [7, 0, 0, 0, 0, 9], [IGNORE] * 5 + [9], f"/{n}", [1, 2, 3, 4], False) for n in range(3)]
    samples = single if form is PLAIN else [sample("a", 3, (4, 8)), sample("b", 4), sample("c", 2, (9, 2))]
    pack = packed(samples, form)
    full = pad(pack, K)
    end = sum(len(one.input_ids) for one in samples)
    assert np.array_equal(embedded(full)[:end], embedded(pack)[:end])
    assert (
        full.tiles is not None and pack.tiles is not None and len(full.tiles) == padded_tiles(len(pack.tiles), 128, K)
    )
    assert len(full.tiles) > len(pack.tiles) or form is MERGED
    added = full.image_slots[pack.image_slots.numel() :]
    assert set(added.tolist()) == {127} and len(added) > 0
    if form is MERGED:
        assert full.image_rows is not None and full.image_rows.numel() == full.image_slots.numel() == 128


def test_tiles_of_many_tokens_are_not_filled_up() -> None:
    assert [padded_tiles(n, 2048, 6) for n in (1, 2, 3)] == [2, 2, 4]
    assert [padded_tiles(n, 2048, 576) for n in (1, 2, 3)] == [1, 2, 3]
