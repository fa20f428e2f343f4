"""How pictures become tiles and tokens, as a configuration says in which nothing is `auto` any more (record_images)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import Config
from engine.data.anyres import Anyres, read_grids
from engine.errors import UsageError
from models.vlm import VLMConfig

if TYPE_CHECKING:
    from engine.data.image_processor import ImageProcessor


def processor(config: Config, shape: VLMConfig) -> ImageProcessor:
    """What this configuration makes of pictures, for a model of this shape."""
    from engine.data.image_processor import processor_of  # a plan needs no Pillow

    aspect = config.dataset.image_aspect_ratio
    assert aspect != "auto"
    return processor_of(shape.vision, aspect_ratio=aspect, anyres=anyres_of(config, shape))


def anyres_of(config: Config, shape: VLMConfig) -> Anyres | None:
    """How pictures are cut into tiles; None where each is one.

    Raises:
        UsageError: the tower's tokens cannot be merged like this.
    """
    if config.dataset.image_aspect_ratio != "anyres":
        return None
    if shape.vision.scales:
        raise UsageError(
            "tiles of anyres for a tower that sees a picture at several sizes",
            where="--dataset.image_aspect_ratio and --model.s2", do="leave one of them out",
        )  # fmt: skip
    tile, merge = shape.vision.image_size, config.model.patch_merge
    assert merge != "auto"
    sizes = tuple((across * tile, down * tile) for across, down in read_grids(config.dataset.anyres_grids))
    try:
        return Anyres(tile=tile, tokens=shape.tokens_per_tile, merge=merge, sizes=sizes)
    except ValueError as error:
        raise UsageError(
            str(error), where="--model.patch_merge", do="give --model.patch_merge flat, or --model.select_feature patch"
        ) from error


def in_order(config: Config, shape: VLMConfig) -> bool:
    """Whether each picture is one tile, and its image slots take the tile's embeddings as they are."""
    return not shape.image_newline and config.dataset.image_aspect_ratio != "anyres"
