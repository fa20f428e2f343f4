"""Tiles and tokens of pictures against LLaVA-NeXT's worked examples, and against transformers' LLaVA-NeXT."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers.models.llava_next import modeling_llava_next as hf

from engine.data.anyres import Anyres, best_resolution, fitted, kept
from engine.data.sample import NEWLINE
from models.vision.preprocessing import Merge

UNPAD = Anyres(tile=336, tokens=576, merge="spatial_unpad")
SQUARE = Anyres(tile=336, tokens=576, merge="spatial_unpad", sizes=((672, 672),))
COUNTS = {
    (640, 480): 2340, (1000, 300): 2182, (336, 336): 1176, (480, 640): 2352, (500, 375): 2340, (1024, 1024): 2928,
    (1920, 1080): 1948, (1080, 1920): 1968, (1700, 2200): 2448, (1344, 336): 1890, (899, 1024): 2640,
    (300, 1000): 2232, (16, 800): 792,
}  # fmt: skip


@pytest.mark.parametrize("size", COUNTS)
def test_token_counts_of_llava_next(size: tuple[int, int]) -> None:
    found = UNPAD.of(size)
    assert found.rows is not None and found.count == len(found.rows) == COUNTS[size]
    assert found.rows[:576] == list(range(576))  # the base tile, whole


def test_which_size_where_and_how_much() -> None:
    assert UNPAD.sizes == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    for size, chosen, scaled, cells in (
        ((640, 480), (672, 672), (672, 504), (36, 48)), ((1000, 300), (1008, 336), (1008, 303), (22, 72)),
        ((336, 336), (336, 672), (336, 336), (24, 24)),
    ):  # fmt: skip
        assert best_resolution(size, UNPAD.sizes) == chosen and fitted(size, chosen) == scaled
        across, down = chosen[0] // 14, chosen[1] // 14
        rows, columns = kept(size, (across, down))
        assert np.zeros((down, across))[rows, columns].shape == cells


def test_nothing_has_more_than_the_most() -> None:
    assert (UNPAD.most_tokens(), UNPAD.most_tiles()) == (2928, 5)
    most = [Anyres(tile=336, tokens=576, merge="spatial_unpad", sizes=(s,)).most_tokens() for s in UNPAD.sizes]
    assert most == [1776, 1752, 2928, 2328, 2376]
    rng = random.Random(0)
    for _ in range(200):
        found = UNPAD.of((rng.randint(1, 3000), rng.randint(1, 3000)))
        assert 576 <= found.count <= 2928 and found.num_tiles <= 5


def test_extreme_shapes_may_keep_nothing_of_the_tiles() -> None:
    counts = {(800, 16): 576, (640, 480): 2340, (1000, 300): 1262, (336, 336): 2928}
    assert {size: SQUARE.of(size).count for size in counts} == counts
    assert SQUARE.of((800, 16)).rows == list(range(576))


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_merging_without_a_newline(merge: Merge) -> None:
    anyres = Anyres(tile=4, tokens=4, merge=merge)
    found = anyres.of((8, 4))  # two tiles side by side, of 2 x 2 tokens
    assert (found.count, found.num_tiles) == (12, 3)
    assert found.rows == (None if merge == "flat" else [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11])


def test_newlines_end_the_rows_of_the_map() -> None:
    found = Anyres(tile=4, tokens=4, merge="spatial_unpad").of((4, 8)).rows  # two tiles, one above the other
    assert found == [0, 1, 2, 3, 4, 5, NEWLINE, 6, 7, NEWLINE, 8, 9, NEWLINE, 10, 11, NEWLINE]


def test_the_same_order_as_transformers() -> None:
    """Its features are counted (height, width); numbers stand for the embeddings. Its rounding differs for 1 size in
    50,000."""
    anyres = Anyres(tile=6, tokens=9, merge="spatial_unpad")
    pinpoints = [[height, width] for width, height in anyres.sizes]
    rng = random.Random(1)
    for width, height in ((rng.randint(1, 60), rng.randint(1, 60)) for _ in range(60)):
        found = anyres.of((width, height))
        across, down = anyres.grid((width, height))
        assert hf.select_best_resolution((height, width), pinpoints) == (down * 6, across * 6)
        cells = 9 + torch.arange(across * down * 9).view(down, across, 3, 3)
        grid = cells.permute(0, 2, 1, 3).reshape(1, down * 3, across * 3)
        theirs = hf.unpad_image(grid, torch.tensor([height, width]))[0]
        rows = torch.nn.functional.pad(theirs, (0, 1), value=NEWLINE)
        assert found.rows == [*range(9), *rows.flatten().tolist()], (width, height)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="a tile has 577; take merging flat"):
        Anyres(tile=336, tokens=577, merge="spatial")
    with pytest.raises(ValueError, match="500 x 336 is not whole tiles of 336"):
        Anyres(tile=336, tokens=576, sizes=((500, 336),))
