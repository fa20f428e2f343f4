"""Packs in few shapes: what is added, and how few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from benchmarks.lengths import sample_lengths
from engine.data.packing import collate, filled_tokens, token_weights
from engine.data.padding import pad
from engine.data.planning import plan_packs, round_up
from engine.data.sample import IGNORE, Sample
from models.pack import FeatureRows, Pack, named_tensors


def samples(lengths: list[int], images: list[bool]) -> list[Sample]:
    return [
        Sample(str(n), [0] * 7 + [1] * (length - 7), [IGNORE] * (length // 3) + [1] * (length - length // 3), None,
               [1, 2, 3, 4, 5, 6] if image else [], False)
        for n, (length, image) in enumerate(zip(lengths, images, strict=True))
    ]  # fmt: skip


def packed(lengths: list[int], images: list[bool]) -> Pack:
    some = samples(lengths, images)
    tiles = [torch.full((3, 4, 4), float(n + 1)) if image else None for n, image in enumerate(images)]
    return collate(some, token_weights(some, "token"), tiles)


def test_what_is_added_is_empty_and_weighs_nothing() -> None:
    pack = packed([300, 700, 90], [True, False, False])
    full = pad(pack)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(full).items()}
    assert shapes == {
        "input_ids": (1152,), "segments.cu_seqlens": (17,), "segments.position_ids": (1152,),
        "segments.router_row": (1152,), "modality_rows": (2,), "tiles": (2, 3, 4, 4), "tile_router": (2,),
        "image_slots": (12,), "supervised": (768,), "labels": (768,), "weights": (768,),
    }  # fmt: skip
    assert full.segments.max_seqlen == 1024 and pack.segments.max_seqlen == 700
    for name, tensor in named_tensors(pack).items():
        assert torch.equal(named_tensors(full)[name][: len(tensor)], tensor), name
    assert set(full.segments.cu_seqlens[7:].tolist()) == {1152}
    assert full.tiles is not None and not full.tiles[1].any() and full.tile_router.tolist() == [0, 1]
    assert not full.image_slots[6:].any() and not full.weights[732:].any()
    assert filled_tokens(full) == filled_tokens(pack) == 1090
    same = named_tensors(pad(full))
    assert all(torch.equal(tensor, same[name]) for name, tensor in named_tensors(full).items())


def test_text_stays_text_and_rows_of_a_table_are_filled_with_row_zero() -> None:
    pack = packed([20], [False])
    assert pad(pack).tiles is None and not pad(pack).image_slots.numel()
    rows = FeatureRows(of_images=torch.tensor([5]), of_tiles=torch.tensor([5]))
    some = samples([20], [True])
    seen = collate(some, token_weights(some, "token"), [torch.ones(3, 4, 4)], table_rows=[5])
    full = pad(seen)
    assert seen.feature_rows is not None and torch.equal(seen.feature_rows.of_tiles, rows.of_tiles)
    assert full.feature_rows is not None and full.feature_rows.of_images.tolist() == [5, 0]
    assert full.feature_rows.of_tiles.tolist() == [5] and full.tiles is not None and len(full.tiles) == 1
    assert full.image_slots.tolist() == [3, 4, 5, 6, 7, 8] + 6 * [0]


def test_a_run_has_tens_of_shapes_and_pays_a_hundredth() -> None:
    """150 steps of 32 samples of ScienceQA's lengths, half with an image; FLOPs as LaVIN-7B has them."""
    rng = np.random.default_rng(0)
    for budget, most in ((2048, 50), (4096, 80), (8192, 75)):
        shapes, flops, added = set[object](), 0.0, 0.0
        lengths = np.array(sample_lengths(150 * 32, seed=1)).reshape(150, 32) - 1
        for step in lengths:
            images = rng.random(32) < 0.5
            for members in plan_packs(step.tolist(), budget, tiles=images.astype(int).tolist()):
                tokens = round_up(2 + int(step[members].sum()))
                rows = round_up(int(0.7 * step[members].sum()))
                pack = _shaped(tokens, len(members), rows, int(images[members].sum()))
                full = pad(pack)
                shapes.add(tuple(tuple(t.shape) for t in named_tensors(full).values()))
                count = 0 if full.tiles is None or pack.tiles is None else len(full.tiles) - len(pack.tiles)
                flops += 4 * 6.48e9 * tokens + 6 * 131e6 * rows
                added += 6 * 131e6 * (full.weights.numel() - rows) + 4 * 302e6 * 257 * count
        assert len(shapes) <= most, budget
        assert added / flops < 0.01, budget


def _shaped(tokens: int, samples: int, rows: int, images: int) -> Pack:
    """A pack of these sizes; what is in it does not matter."""
    pack = packed([20], [True])
    bounds = torch.cat(
        (torch.arange(samples + 2, dtype=torch.int32), torch.tensor([tokens, tokens], dtype=torch.int32))
    )
    empty = {
        name: torch.zeros(size, dtype=torch.int64)
        for name, size in {"input_ids": tokens, "supervised": rows, "labels": rows}.items()
    }
    segments = replace(pack.segments, cu_seqlens=bounds, max_seqlen=500)
    return replace(
        pack, segments=segments, weights=torch.zeros(rows), tiles=torch.zeros(images, 3, 1, 1) if images else None,
        tile_router=torch.arange(images), image_slots=torch.zeros(6 * images, dtype=torch.int64), **empty,
    )  # fmt: skip
