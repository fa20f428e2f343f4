"""A decoded picture to the tiles that a tower was trained on: its size, the way a picture becomes square, the colours.

Each family of towers says what it was trained on (models/vision/preprocessing.py): squashed to a tile, or the short
side to the tile's and the middle cut out; its mean and deviation of colours.

`pad` puts a picture on a square of the mean colour first, `anyres` gives several tiles (anyres.py). All scaling is
PIL's bicubic filter on bytes, colours are divided by 255; EXIF orientation is not applied, as in all these projects.
Bytes are those of transformers' PIL processors, exactly; after the division they may differ in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.anyres import Anyres, best_resolution, fitted
from engine.errors import DataError
from models.vision.config import TowerConfig
from models.vision.preprocessing import LAVIN, RGB, AspectRatio, Preprocessing

MAX_SCALED = 100_000_000  # pixels of a picture on its way to a tile: a thin one may become very long or very wide


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessor:
    """What becomes of a picture. As it is, LaVIN's."""

    size: int = 224  # pixels a side of a tile
    preprocessing: Preprocessing = LAVIN
    pad: bool = False  # on a square of the mean colour first
    anyres: Anyres | None = None  # several tiles

    def tiles(self, image: Image.Image) -> Tensor:
        """uint8 [3, size, size], or with anyres [n, 3, size, size], the whole picture first.

        Raises:
            DataError: the picture is so thin that it would take too much memory.
        """
        image = image.convert("RGB")
        if self.anyres is None:
            return _bytes(self._square(image))
        return torch.stack([_bytes(tile) for tile in (_squashed(image, self.size), *_cut(image, self.anyres))])

    def normalize(self, tiles: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] -> fp32: (x / 255 - mean) / deviation."""
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.preprocessing.mean, self.preprocessing.std))
        return (tiles.float() / 255 - mean) / deviation

    def _square(self, image: Image.Image) -> Image.Image:
        if self.pad:
            image = _padded(image, self.preprocessing.mean)
        return _middle(image, self.size) if self.preprocessing.crop else _squashed(image, self.size)


def processor_of(
    tower: TowerConfig, *, aspect_ratio: AspectRatio = "square", anyres: Anyres | None = None
) -> ImageProcessor:
    """What this tower is fed."""
    return ImageProcessor(
        size=tower.picture_size, preprocessing=tower.preprocessing,
        pad=aspect_ratio == "pad", anyres=anyres if aspect_ratio == "anyres" else None,
    )  # fmt: skip


def _bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _squashed(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _middle(image: Image.Image, size: int) -> Image.Image:
    """The short side scaled to `size`, and the middle of the long one."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    _check(image, width, height)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + size, top + size))


def _padded(image: Image.Image, mean: RGB) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    _check(image, side, side)
    red, green, blue = (int(255 * value) for value in mean)
    canvas = Image.new("RGB", (side, side), (red, green, blue))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _cut(image: Image.Image, anyres: Anyres) -> list[Image.Image]:
    """The picture scaled into its best size, on black, in tiles, row by row."""
    across, down = best_resolution(image.size, anyres.sizes)
    scaled = image.resize(fitted(image.size, (across, down)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (across, down))
    canvas.paste(scaled, ((across - scaled.width) // 2, (down - scaled.height) // 2))
    side = anyres.tile
    corners = [(x, y) for y in range(0, down, side) for x in range(0, across, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def _check(image: Image.Image, width: int, height: int) -> None:
    if width * height > MAX_SCALED:
        raise DataError(
            f"an image of {image.width} x {image.height} pixels is too thin",
            why=f"it would be scaled or padded to {width} x {height} pixels, the limit is {MAX_SCALED}",
            do="cut it, or take --dataset.image_aspect_ratio anyres",
        )
