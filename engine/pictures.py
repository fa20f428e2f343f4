"""How pictures become tiles and tokens, once flags and a checkpoint's settings are put together."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import Config
from engine.data.anyres import GRIDS, Anyres, AspectRatio, Merge, Size
from engine.data.room import usual_length
from engine.errors import UsageError
from models.vlm import VLMConfig

if TYPE_CHECKING:
    from engine.data.image_processor import ImageProcessor

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What the settings of a vision-language checkpoint say; as it is, what holds where nobody says anything."""

    merge: Merge = "flat"
    aspect_ratio: AspectRatio = "square"
    pinpoints: tuple[Size, ...] = ()  # (width, height) in pixels; empty: GRIDS
    max_length: int | None = None  # tokens of a sample, pictures' and text's


def record_pictures(config: Config, said: Pictures, tile: int) -> None:
    """Puts what was said in the place of each `auto`, and warns about what a flag says of tiles where there are none.
    `tile`: pixels a side.

    Raises:
        UsageError: a size that was said is not whole tiles.
    """
    model, dataset = config.model, config.dataset
    if dataset.image_aspect_ratio == "auto":
        dataset.image_aspect_ratio = said.aspect_ratio
    if dataset.image_aspect_ratio != "anyres":
        for flag, value, idle in (
            ("model.patch_merge", model.patch_merge, ("auto", "flat")),
            ("dataset.anyres_grids", dataset.anyres_grids, ("auto",)),
        ):
            if value not in idle:
                logger.warning("--%s %s has no effect without --dataset.image_aspect_ratio anyres", flag, value)
    if model.patch_merge == "auto":
        model.patch_merge = said.merge
    if dataset.anyres_grids == "auto" and said.pinpoints:
        for width, height in said.pinpoints:
            if width % tile or height % tile:
                raise UsageError(
                    f"the checkpoint's image_grid_pinpoints have {width} x {height} pixels", where="--model.language",
                    why=f"a tile of the tower has {tile} x {tile}",
                    do="name the tower it was trained with as --model.vision, or give --dataset.anyres_grids",
                )  # fmt: skip
        dataset.anyres_grids = ",".join(f"{width // tile}x{height // tile}" for width, height in said.pinpoints)


def record_length(config: Config, said: Pictures, model: VLMConfig) -> None:
    """Puts a length in the place of None: the checkpoint's, else the usual one for what a picture takes."""
    if config.dataset.max_seq_len is None:
        usual = usual_length(model.tokens_per_tile, tiles=config.dataset.image_aspect_ratio == "anyres")
        config.dataset.max_seq_len = said.max_length or usual


def has_newline(config: Config, said: Pictures) -> bool:
    """Whether tokens are put together with an embedding at the end of each row."""
    merge = said.merge if config.model.patch_merge == "auto" else config.model.patch_merge
    return merge == "spatial_unpad"


def processor(config: Config, shape: VLMConfig) -> ImageProcessor:
    """What this configuration makes of pictures, for a model of this shape."""
    from engine.data.image_processor import processor_of  # a plan needs no Pillow

    vision = shape.vision
    aspect: AspectRatio = "square" if config.dataset.image_aspect_ratio == "auto" else config.dataset.image_aspect_ratio
    return processor_of(
        vision.family, vision.picture_size, class_tokens=vision.select_feature == "class_tokens", aspect_ratio=aspect,
        anyres=anyres_of(config, shape),
    )  # fmt: skip


def anyres_of(config: Config, shape: VLMConfig) -> Anyres | None:
    """How pictures are cut into tiles; None where each is one.

    Raises:
        UsageError: the grids cannot be read, or the tower's tokens cannot be merged like this.
    """
    if config.dataset.image_aspect_ratio != "anyres":
        return None
    if shape.vision.scales:
        raise UsageError(
            "tiles of anyres for a tower that sees a picture at several sizes",
            where="--dataset.image_aspect_ratio and --model.s2", do="leave one of them out",
        )  # fmt: skip
    tile = shape.vision.image_size
    merge: Merge = "flat" if config.model.patch_merge == "auto" else config.model.patch_merge
    sizes = tuple((across * tile, down * tile) for across, down in _grids(config.dataset.anyres_grids))
    try:
        return Anyres(tile=tile, tokens=shape.tokens_per_tile, merge=merge, sizes=sizes)
    except ValueError as error:
        raise UsageError(
            str(error), where="--model.patch_merge", do="give --model.patch_merge flat, or --model.select_feature patch"
        ) from error


def in_order(config: Config, shape: VLMConfig) -> bool:
    """Whether each picture is one tile, and its image slots take the tile's embeddings as they are."""
    return not shape.image_newline and config.dataset.image_aspect_ratio != "anyres"


def _grids(text: str) -> tuple[Size, ...]:
    if text == "auto":
        return GRIDS
    found = [re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", part.strip()) for part in text.split(",")]
    sizes = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
    if len(sizes) < len(found):
        raise UsageError(
            f"grids of tiles must be across x down, as 2x2,1x3; got {text!r}", where="--dataset.anyres_grids"
        )
    return sizes
