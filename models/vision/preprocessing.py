"""How a picture becomes tiles: what a family of towers was trained on, and the choices that LLaVA has beside that.

What scales pictures (engine/data/image_processor.py), what cuts them (engine/data/anyres.py) and what reads and writes
descriptions of both (models/weights/) have it from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RGB = tuple[float, float, float]
Size = tuple[int, int]  # (width, height)
AspectRatio = Literal["square", "pad", "anyres"]  # as it is; on a square of the mean colour; in several tiles
Merge = Literal["flat", "spatial", "spatial_unpad"]  # how the tokens of a picture's tiles are put together


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Pictures are scaled by a bicubic filter; colours, 0 to 1, become (colour - mean) / std."""

    mean: RGB
    std: RGB
    crop: bool  # the short side to the tile's, and the middle cut out; False: squashed to the tile


LAVIN = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=False)  # ImageNet's, not CLIP's
CLIP = Preprocessing(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), crop=True
)  # fmt: skip
SIGLIP = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=False)
