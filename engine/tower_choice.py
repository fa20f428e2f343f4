"""What is taken of a vision tower: LaVIN's class tokens, or the tokens of one layer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from engine.config import Config, trained_vision
from engine.errors import CheckpointError, UsageError
from models.vision.tower import TowerConfig
from models.weights.towers import VisionSource, open_vision
from models.weights.vlm_settings import VLMSettings

SELECT_LAYER = -2  # LLaVA's, Bunny's and Imp's: what the last block but one gives


def named_tower(config: Config, settings: VLMSettings | None, found: Path | None) -> tuple[Path | None, str]:
    """The tower of a base without one in its files, and what names it: the flag, else the checkpoint's settings; else
    `found`, which is None where nothing was.

    Raises:
        CheckpointError: the settings are a vision-language checkpoint's and name none.
    """
    if settings is None or config.model.vision:
        return found, "--model.vision"
    if not settings.tower:
        raise CheckpointError(
            "no vision tower is in the files that are here, and the checkpoint names none",
            where="its config.json (mm_vision_tower)",
            do="pass --model.vision with the tower that it was trained with",
        )  # fmt: skip
    return Path(settings.tower_source), "the checkpoint's config.json (mm_vision_tower)"


def with_choices(tower: VisionSource, path: Path, wanted: TowerConfig) -> VisionSource:
    """`tower`, which was read from `path`, with what is `wanted` of it: only the blocks on the way there are read."""
    if replace(wanted, scales=()) == tower.config:
        return replace(tower, config=wanted)
    tower.close()
    layer = None if wanted.select_feature == "class_tokens" else wanted.select_layer
    again = open_vision(path, select_layer=layer, select_feature=wanted.select_feature)
    return replace(again, config=wanted)


def selected(config: Config, tower: TowerConfig, settings: VLMSettings | None, projector: str) -> TowerConfig:
    """The tower with the tokens that flags, a checkpoint's `settings` and the kind of the projector (auto: not known
    yet) ask for.

    Raises:
        UsageError: this tower does not have them.
    """
    if takes_class_tokens(config, tower, projector):
        return replace(tower, select_feature="class_tokens")
    layer, feature = config.model.select_layer, config.model.select_feature
    if layer is None:
        layer = SELECT_LAYER if settings is None else settings.select_layer
    if feature == "auto":
        feature = "patch" if settings is None else settings.select_feature
    try:
        return replace(tower, select_layer=layer, select_feature=feature)
    except ValueError as error:
        raise UsageError(str(error), where="--model.select_layer and --model.select_feature") from error


def takes_class_tokens(config: Config, tower: TowerConfig, projector: str) -> bool:
    """Whether the image tokens are LaVIN's six class tokens: its projector is asked for, or its adapters are
    and nothing speaks against it."""
    if projector == "auto":
        nothing_said = config.model.select_layer is None and config.model.select_feature == "auto"
        with_mma = "mma" in (config.train.language, trained_vision(config))
        return tower.family == "clip" and with_mma and nothing_said
    if projector == "lavin" and not tower.has_class_token:
        raise UsageError(
            f"model.projector lavin with a {tower.family} tower", where="--model.projector and --model.vision",
            why="it reads class tokens, and this tower has none", do="--model.projector mlp2x_gelu, or a CLIP tower",
        )  # fmt: skip
    return projector == "lavin"


def seen_at_scales(config: Config, tower: TowerConfig, settings: VLMSettings | None) -> TowerConfig:
    """The tower with the sizes (S2) that --model.s2 says, else a checkpoint's `settings`.

    Raises:
        UsageError: they cannot be read, or this tower cannot have them.
    """
    text = config.model.s2
    if text == "auto":
        scales = () if settings is None else settings.scales
    elif text == "none":
        scales = ()
    elif not re.fullmatch(r"\d{1,5}(,\d{1,5})*", text):
        raise UsageError(f"model.s2 is {text!r}", where="--model.s2", do="give auto, none, or sizes: 384,768,1152")
    else:
        scales = tuple(map(int, text.split(",")))
    try:
        return replace(tower, scales=scales)
    except ValueError as error:
        raise UsageError(str(error), where="--model.s2", do="--model.s2 none, or name another tower") from error


def check_selection(config: Config, tower: TowerConfig) -> None:
    """The tower in a checkpoint was trained for what is taken of it."""
    for name, unsaid in (("select_layer", None), ("select_feature", "auto")):
        flag, trained = getattr(config.model, name), getattr(tower, name)
        if flag not in (unsaid, trained):
            raise UsageError(
                f"model.{name} is {flag}, and the checkpoint's tower was trained with {trained}",
                where=f"--model.{name}", do="leave it out, or name another tower with --model.vision",
            )  # fmt: skip
