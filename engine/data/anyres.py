"""Pictures in several tiles (LLaVA-NeXT's anyres), and the order in which their tokens stand in the text.

A picture is seen whole, squashed to one tile, and in detail: scaled into the best of a few sizes that are whole tiles,
centred on black, and cut. The base tile comes first, then the others row by row. All sizes here are (width, height) in
pixels, as in LLaVA; transformers counts the other way round.

What the tower says of the tiles, K tokens each, is put together by one of three rules. Each is an order in which image
slots take embeddings, so nothing is computed but indices, and the model needs to know none of them:

    flat             base, then tile after tile
    spatial          base, then the grid of tiles as one map, row by row across tiles
    spatial_unpad    the same, without the map's rows or columns that saw only black, and each row of the map ended by
                     the learned newline

Rounding is LLaVA's plain int(); transformers rounds to seven digits first, so for a few sizes in 100,000 (88 x 99,
1408 x 792) it keeps a row or a column more or less on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt

import numpy as np

from engine.data.sample import NEWLINE
from engine.errors import UsageError
from models.vision.preprocessing import Merge, Size

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's, in tiles


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The tokens of one picture: K in order where `rows` is None, else one for each entry."""

    count: int
    num_tiles: int = 1
    rows: list[int] | None = None  # as in Sample.image_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Anyres:
    """How pictures become tiles of `tile` pixels a side and `tokens` tokens each.

    Raises:
        ValueError: a size is not whole tiles, there is none, or tokens that are no square are to be put on a map.
    """

    tile: int
    tokens: int  # K'
    merge: Merge = "flat"
    sizes: tuple[Size, ...] = ()  # to choose from; empty: GRIDS

    def __post_init__(self) -> None:
        if not self.sizes:
            object.__setattr__(self, "sizes", tuple((w * self.tile, h * self.tile) for w, h in GRIDS))
        for width, height in self.sizes:
            if width < 1 or height < 1 or width % self.tile or height % self.tile:
                raise ValueError(f"anyres size {width} x {height} is not whole tiles of {self.tile} pixels")
        if self.merge != "flat" and isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(
                f"{self.merge} merging needs tokens that form a square, a tile has {self.tokens}; take merging flat"
            )

    def grid(self, size: Size) -> Size:
        """Tiles across and down, of a picture of this size."""
        width, height = best_resolution(size, self.sizes)
        return width // self.tile, height // self.tile

    def of(self, size: Size) -> ImageTokens:
        """The tokens of a picture of this size."""
        across, down = self.grid(size)
        num_tiles = 1 + across * down
        if self.merge == "flat":
            return ImageTokens(num_tiles * self.tokens, num_tiles)
        rows = self._rows(size, across, down)
        return ImageTokens(len(rows), num_tiles, rows)

    def _rows(self, size: Size, across: int, down: int) -> list[int]:
        side, tokens = isqrt(self.tokens), self.tokens
        cells = tokens + np.arange(across * down * tokens)  # behind the base tile
        grid = cells.reshape(down, across, side, side).transpose(0, 2, 1, 3).reshape(down * side, across * side)
        if self.merge == "spatial_unpad":
            rows, columns = kept(size, (across * side, down * side))
            grid = np.pad(grid[rows, columns], ((0, 0), (0, 1)), constant_values=NEWLINE)
        found: list[int] = np.concatenate((np.arange(tokens), grid.ravel())).tolist()
        return found

    def most_tokens(self) -> int:
        """No picture has more: those that fill a size have all of its map."""
        return max(self.of(size).count for size in self.sizes)

    def most_tiles(self) -> int:
        """No picture has more."""
        return 1 + max(width // self.tile * (height // self.tile) for width, height in self.sizes)


def read_grids(text: str) -> tuple[Size, ...]:
    """`1x2,2x2` -> ((1, 2), (2, 2)).

    Raises:
        UsageError: it is something else.
    """
    found = [re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", part.strip()) for part in text.split(",")]
    sizes = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
    if len(sizes) < len(found):
        raise UsageError(
            f"grids of tiles must be across x down, as 2x2,1x3; got {text!r}", where="--dataset.anyres_grids"
        )
    return sizes


def best_resolution(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` in which a picture keeps most of its pixels; of these, that with the fewest others; of these,
    the first."""

    def merit(candidate: Size) -> tuple[int, int]:
        (width, height), (across, down) = size, candidate
        scale = min(across / width, down / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - across * down

    return max(sizes, key=merit)


def fitted(size: Size, into: Size) -> Size:
    """The size of a picture that is scaled into another size as a whole."""
    (width, height), (across, down) = size, into
    if across / width < down / height:
        return across, min(ceil(height * (across / width)), down)
    return min(ceil(width * (down / height)), across), down


def kept(size: Size, cells: Size) -> tuple[slice, slice]:
    """Rows and columns of a map of so many cells (across, down) that saw a picture of this size, centred in it."""
    (width, height), (across, down) = size, cells
    if width / height > across / down:
        bar = (down - int(height * (across / width))) // 2
        return slice(bar, down - bar), slice(None)
    bar = (across - int(width * (down / height))) // 2
    return slice(None), slice(bar, across - bar)
