"""How pictures reach the language model: everything of it that may be `auto`, settled in one place, from flags, a
checkpoint's settings and the files that were found. A plan without weights settles it by the same rules.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from engine.config import Config
from engine.data.anyres import GRIDS, read_grids
from engine.data.room import usual_length
from engine.errors import UsageError
from engine.tower_choice import check_selection, seen_at_scales, selected
from models.projectors.config import ProjectorConfig
from models.vision.preprocessing import AspectRatio, Merge, Size
from models.vision.tower import TowerConfig
from models.weights.vlm_settings import VLMSettings

logger = logging.getLogger("nibble")

DEFAULT_PROJECTOR = "mlp2x_gelu"  # LLaVA's


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChoices:
    """What flags and files came to."""

    tower: TowerConfig  # with the layer, the tokens and the sizes (S2) that are taken of it
    projector: ProjectorConfig
    aspect_ratio: AspectRatio
    merge: Merge  # how the tokens of an image's tiles are put together
    grids: tuple[Size, ...]  # tiles across and down that anyres chooses from; empty without it
    max_length: int  # tokens of a sample, the images' and the text's

    @property
    def has_newline(self) -> bool:
        """Whether a learned embedding ends each row of an image's tokens."""
        return self.merge == "spatial_unpad"

    @property
    def pinpoints(self) -> tuple[Size, ...]:
        """The grids as LLaVA writes them: (width, height) in pixels."""
        tile = self.tower.image_size
        return tuple((across * tile, down * tile) for across, down in self.grids)


def choose_images(
    config: Config, tower: TowerConfig, settings: VLMSettings | None = None, projector: str = "auto", *,
    held: bool = False,
) -> ImageChoices:  # fmt: skip
    """A flag counts first, then what the checkpoint says (`settings`, and `projector`, the kind of its weights), then
    what is usual for such a model.

    Args:
        tower: as its files describe it.
        held: its weights are in the checkpoint: what is taken of it stays as it was trained.
    Raises:
        UsageError: a flag cannot be read, or these parts do not go together.
    """
    kind = projector if config.model.projector == "auto" else config.model.projector
    if held:
        check_selection(config, tower)
    else:
        tower = selected(config, tower, settings, kind)
    tower = seen_at_scales(config, tower, settings)
    if kind == "auto":
        kind = "lavin" if tower.select_feature == "class_tokens" else DEFAULT_PROJECTOR
    try:
        made = ProjectorConfig(kind=kind, hidden=config.model.projector_hidden)
        tokens = made.tokens(tower.tokens_out)
    except ValueError as error:
        raise UsageError(str(error), where="--model.projector") from error
    aspect, merge, length = config.dataset.image_aspect_ratio, config.model.patch_merge, config.dataset.max_seq_len
    if aspect == "auto":
        aspect = "square" if settings is None else settings.aspect_ratio
    if merge == "auto":
        merge = "flat" if settings is None else settings.merge
    length = length or (None if settings is None else settings.max_length)
    return ImageChoices(
        tower=tower, projector=made, aspect_ratio=aspect, merge=merge,
        grids=_grids(config, settings, tower.image_size) if aspect == "anyres" else (),
        max_length=length or usual_length(tokens, tiles=aspect == "anyres"),
    )  # fmt: skip


def record_images(config: Config, images: ImageChoices) -> None:
    """Puts what was chosen in the place of each `auto`, and warns about what a flag says of tiles where there are
    none."""
    model, dataset = config.model, config.dataset
    if images.aspect_ratio != "anyres":
        for flag, value, idle in (
            ("model.patch_merge", model.patch_merge, ("auto", "flat")),
            ("dataset.anyres_grids", dataset.anyres_grids, ("auto",)),
        ):
            if value not in idle:
                logger.warning("--%s %s has no effect without --dataset.image_aspect_ratio anyres", flag, value)
    model.projector = images.projector.kind
    if images.tower.select_feature != "class_tokens":
        model.select_layer, model.select_feature = images.tower.select_layer, images.tower.select_feature
    if images.tower.scales:
        model.s2 = ",".join(map(str, images.tower.scales))
    model.patch_merge, dataset.image_aspect_ratio = images.merge, images.aspect_ratio
    if images.grids:
        dataset.anyres_grids = ",".join(f"{across}x{down}" for across, down in images.grids)
    dataset.max_seq_len = images.max_length


def _grids(config: Config, settings: VLMSettings | None, tile: int) -> tuple[Size, ...]:
    """`tile`: pixels a side."""
    if config.dataset.anyres_grids != "auto":
        return read_grids(config.dataset.anyres_grids)
    pinpoints = () if settings is None else settings.grid_pinpoints
    for width, height in pinpoints:
        if width % tile or height % tile:
            raise UsageError(
                f"the checkpoint's image_grid_pinpoints have {width} x {height} pixels", where="--model.language",
                why=f"a tile of the tower has {tile} x {tile}",
                do="name the tower it was trained with as --model.vision, or give --dataset.anyres_grids",
            )  # fmt: skip
    return tuple((width // tile, height // tile) for width, height in pinpoints) or GRIDS
