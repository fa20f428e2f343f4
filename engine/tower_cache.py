"""What a frozen tower says about each image, kept: an image is decoded, copied and looked at once, not once an epoch.

The features of an image, [K, W] in the tower's dtype, are a row of a table on the device: 12 KB of LaVIN's six class
tokens of ViT-L/14 in 16 bits. An image that finds no room is looked at each time. The tower looks at one image at a
time, so that features depend on nothing but the image, not on the others of a pack or on when a run was resumed.

This is for towers of which nothing learns (--train.vision frozen). With LaVIN's placement the first adapter stands
before the first block's attention, and below it are only the patch convolution and a norm: 0.2 % of the tower's FLOPs,
which are not worth the 526 KB of an image's 257 tokens: nothing is kept then. Nor where an image's features are more
than MOST_AN_IMAGE: of a tower's 576 patches they are 1.2 MB, the table has room for 113 images of some 100,000, and
the tower would look at all others one by one. `keeps_features` tells the cases apart. (Images of several tiles have no
table either: engine/passes.py.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.pack import Pack
from models.vision.tower import Tower, TowerConfig

TABLE_BYTES = 128 << 20
MOST_AN_IMAGE = 64 << 10  # bytes: a table has room for 2,048 images at least


def keeps_features(tower: Tower, itemsize: int) -> bool:
    """Whether the tower's output for an image is always the same, since nothing of it learns, and small enough;
    `itemsize`: bytes of a number of it."""
    learns = any(parameter.requires_grad for parameter in tower.parameters())
    return not learns and image_bytes(tower.config, itemsize) <= MOST_AN_IMAGE


def image_bytes(tower: TowerConfig, itemsize: int) -> int:
    """Of the features of one image."""
    return tower.tokens_out * tower.feature_width * itemsize


def table_rows(tower: TowerConfig, itemsize: int, table_bytes: int = TABLE_BYTES) -> int:
    """Images that a table of so many bytes has room for."""
    return table_bytes // image_bytes(tower, itemsize)


def most_bytes(tower: TowerConfig, itemsize: int, most_new: int) -> int:
    """Of the values of a TowerCache, however many images the data have."""
    return (1 + table_rows(tower, itemsize) + most_new) * image_bytes(tower, itemsize)


class FeatureTable:
    """Which row of a table each image has. Row 0 is zeros; behind the rows of images are those of images that found no
    room, for the length of a pack. Host side; to be asked in the order in which the tower will see the packs."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._row: dict[str, int] = {}

    def clear(self) -> None:
        """No image has been seen."""
        self._row.clear()

    def place(self, path: str) -> tuple[int | None, bool]:
        """-> (the image's row, or None where there is no room, whether it must be looked at)."""
        if path in self._row:
            return self._row[path], False
        if len(self._row) == self.rows:
            return None, True
        self._row[path] = 1 + len(self._row)
        return self._row[path], True

    def spare(self, number: int) -> int:
        """The row of a pack's image `number` of those that have no room."""
        return 1 + self.rows + number


class TowerCache:
    """The table's values on the device, for `images` images at most, and for as many as `table_bytes` hold.
    `most_new`: images of a pack, at most."""

    def __init__(
        self, tower: Tower, device: torch.device, *, images: int, most_new: int, table_bytes: int = TABLE_BYTES
    ) -> None:
        self.tower = tower
        dtype, config = tower.patch_embed.weight.dtype, tower.config
        self.places = FeatureTable(min(images, table_rows(config, dtype.itemsize, table_bytes)))
        size = 1 + self.places.rows + most_new, config.tokens_out, config.feature_width
        self.values = torch.zeros(size, dtype=dtype, device=device)

    @torch.no_grad()
    def fill(self, pack: Pack) -> Pack:
        """The pack (on the device) with features in place of tiles; the tower looks at those first."""
        if pack.feature_rows is None:
            return pack
        for number in range(0 if pack.tiles is None else pack.tiles.shape[0]):
            assert pack.tiles is not None
            row = pack.feature_rows.of_tiles[number : number + 1]
            self.values.index_copy_(0, row, self._look(pack.tiles[number : number + 1]))
        features = self.values.index_select(0, pack.feature_rows.of_images)
        router = pack.tile_router[:0]  # of no tiles; else a graph would be one for packs with as many new images only
        return replace(pack, tiles=None, tile_router=router, features=features, feature_rows=None)

    def _look(self, tile: Tensor) -> Tensor:  # [1, 3, H, W] -> [1, K, W]
        features: Tensor = self.tower(tile, None, None)
        return features.to(self.values.dtype)
