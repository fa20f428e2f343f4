"""Packs of few shapes, so that a CUDA graph of one shape serves many packs (engine/graphs.py).

    T tokens            as they are: multiples of 128
    S segments          multiples of 16, by empty segments
    L supervised rows   multiples of a quarter of T, by rows of weight 0
    N tiles             multiples of T / 1024, at least of 2, by zeros; where a tile has many tokens, as they are
    I image slots       those of all tiles, or where embeddings are gathered multiples of a quarter of T
    longest segment     512, 1024, 2048, ...: a bound, which is all that attention asks for

Nothing of this reaches the loss or a gradient. Added image slots are row 0 where that is a modality row: the model
writes its embedding there after the images, so what an added tile put there is gone and its gradient is zero. Without
modality rows they are the last row, which fills the pack up and is in no sample's segment: packs without modality rows
always have one (engine/data/planning.py). Sums over more rows may round differently.

Counted in 2,000 steps of 32 samples with ScienceQA's lengths (benchmarks/lengths.py; half of them with an image, 70 %
of their tokens supervised): the shapes; how many passes are replayed where a shape's first pass is not and 64 shapes
may be captured; what the filling adds to rows (beyond multiples of 128) and to tiles, and as a share of LaVIN-7B's
FLOPs.

    tokens_per_batch    packs    shapes   replayed   rows            tiles           both
    2,048               10,284   50       99.5 %     16 %, 0.33 %    16 %, 0.32 %    0.65 %
    4,096                5,885   68       98.8 %     13 %, 0.26 %    23 %, 0.46 %    0.72 %
    8,192                3,876   63       98.4 %     12 %, 0.24 %    25 %, 0.49 %    0.73 %

Tokens are not filled up further: multiples of 256 would add 1.3 % of FLOPs at 8,192. With nothing filled up
there would be 4,115, 1,962 and 1,391 shapes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.data.packing import LAVIN
from engine.data.planning import round_up
from models.pack import FeatureRows, Pack

SEGMENTS = 16
SHORTEST_BOUND = 512
MANY_TOKENS = 128  # of a tile: a pack of T tokens has T / 128 of such tiles at most, and each is dear


def pad(pack: Pack, slots: int = LAVIN.tile_tokens) -> Pack:
    """`pack` (on the CPU) in one of few shapes. `slots`: image tokens of a tile, K'."""
    tokens = pack.input_ids.numel()
    bounds = pack.segments.cu_seqlens
    rows = min(_up(pack.supervised.numel(), round_up(-(-tokens // 4))), tokens)
    segments = replace(
        pack.segments,
        cu_seqlens=_filled(bounds, 1 + padded_segments(bounds.numel() - 1), tokens),
        max_seqlen=_bound(pack.segments.max_seqlen),
    )
    pack = replace(
        pack, segments=segments, supervised=_filled(pack.supervised, rows), labels=_filled(pack.labels, rows),
        weights=_filled(pack.weights, rows),
    )  # fmt: skip
    return _pad_images(pack, tokens, slots)


def padded_segments(count: int) -> int:
    """S of a pack with `count` segments."""
    return _up(count, SEGMENTS)


def padded_tiles(count: int, tokens: int, slots: int) -> int:
    """N of a pack of so many tokens with `count` tiles of `slots` image tokens each."""
    return count if slots >= MANY_TOKENS else _up(count, max(2, -(-tokens // 1024)))


def _pad_images(pack: Pack, tokens: int, slots: int) -> Pack:
    unwanted = 0 if pack.modality_rows.numel() else tokens - 1
    if pack.feature_rows is not None:
        of_images = pack.feature_rows.of_images
        count = padded_tiles(of_images.numel(), tokens, slots)  # row 0 of the table is zeros
        rows = FeatureRows(of_images=_filled(of_images, count), of_tiles=pack.feature_rows.of_tiles)
        return replace(pack, feature_rows=rows, image_slots=_filled(pack.image_slots, count * slots, unwanted))
    if pack.tiles is None:
        return pack
    real = pack.tiles.shape[0]
    count = padded_tiles(real, tokens, slots)
    pack = replace(
        pack,
        tiles=torch.cat((pack.tiles, pack.tiles.new_zeros(count - real, *pack.tiles.shape[1:]))),
        tile_router=torch.cat((pack.tile_router, torch.arange(real, count))),  # each its own
    )
    if pack.image_rows is None:
        return replace(pack, image_slots=_filled(pack.image_slots, count * slots, unwanted))
    size = min(_up(pack.image_slots.numel(), round_up(-(-tokens // 4))), tokens)
    gathered = torch.where(pack.image_rows == real * slots, count * slots, pack.image_rows)  # the newline stays last
    return replace(pack, image_slots=_filled(pack.image_slots, size, unwanted), image_rows=_filled(gathered, size))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _bound(longest: int) -> int:
    return max(SHORTEST_BOUND, 1 << (longest - 1).bit_length())


def _filled(values: Tensor, size: int, value: int = 0) -> Tensor:
    """[n] -> [size], with `value` behind."""
    return torch.cat((values, values.new_full((size - values.numel(),), value)))
