"""What the config.json of a vision-language model says beside its language model: tower, projector, merging of tiles.

The keys are LLaVA's `mm_*`, which Bunny and Imp share, or those of transformers' llava and llava_next. transformers
counts a grid's sizes as (height, width), LLaVA as (width, height): here they are LLaVA's, in its order.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from models.vision.config import LayerFeature
from models.vision.preprocessing import AspectRatio, Merge, Size
from models.weights.errors import WeightsError
from models.weights.hub import REVISIONS
from models.weights.settings import MOST_LAYERS, MOST_PIXELS, MOST_POSITIONS, Settings
from models.weights.towers.registry import family_described

ChoiceT = TypeVar("ChoiceT", bound=str)

MOST_SIZES = 1 << 10  # that a grid may have
S2_SCALES = "384,768,1152"  # Bunny's
TOWER_TRAINED = ("unfreeze_mm_vision_tower", "unfreeze_vision_tower")  # LLaVA's key, Bunny's
IMP = ("imp", "imp_phi3")  # model_type
REFUSED = {  # keys that would need another model -> what they would need
    "mm_use_im_start_end": "tokens around an image",
    "mm_use_im_patch_token": "a token of its own for each patch",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VLMSettings:
    """The seam between tower and language model, in LLaVA's terms."""

    tower: str  # mm_vision_tower as its author typed it: a Hub id or a path; empty where the file does not say
    projector: str  # mm_projector_type: linear, mlp2x_gelu, identity, ...
    select_layer: int = -2  # index into (embeddings, output of block 1, ...)
    select_feature: LayerFeature = "patch"
    merge: Merge = "flat"  # how the tokens of an image's tiles are put together
    aspect_ratio: AspectRatio = "square"
    grid_pinpoints: tuple[Size, ...] = ()  # (width, height) in pixels: the sizes that anyres may choose
    scales: tuple[int, ...] = ()  # S2: pixels a side at which the tower sees a picture; empty: at its own size alone
    tower_trained: bool = False  # the tower's weights are in the checkpoint and are not those of `tower`
    tower_revision: str = ""  # a name in hub.REVISIONS, where the tower's files of today are not those it was built on
    max_length: int | None = None  # tokens

    @property
    def tower_source(self) -> str:
        """What to open as the tower: its name, behind it the revision where one is meant and no such path is here."""
        if not self.tower_revision or Path(self.tower).exists():
            return self.tower
        return f"{self.tower}@{self.tower_revision}"


def is_vlm(settings: Settings) -> bool:
    """Whether a config.json describes a vision-language model, in either spelling."""
    return settings.values.get("mm_vision_tower") is not None or settings.inner("text_config") is not None


def vlm_settings(settings: Settings, projector: str) -> VLMSettings:
    """What a config.json says in either spelling. `projector` is the kind that the tensors show, for files that do not
    say it; where both do, they must agree. "identity": there is none; empty: nobody has looked.

    Raises:
        WeightsError: a key has a value that we do not compute.
    """
    return _transformers(settings, projector) if settings.inner("text_config") else _llava(settings, projector)


def _llava(settings: Settings, projector: str) -> VLMSettings:
    for key, what in REFUSED.items():
        if settings.flag(key):
            raise WeightsError(settings.path, f"{key} true is not supported: it would need {what}")
    settings.only("mm_resampler_type")
    said = settings.text("mm_projector_type") or (projector if projector != "identity" else "linear")
    if projector == "identity" != said:
        raise _without_projector(settings, said)
    if projector and said != projector:
        raise WeightsError(settings.path, f"mm_projector_type is {said!r}, and the tensors are those of {projector!r}")
    tower = settings.text("mm_vision_tower")
    return VLMSettings(
        tower=tower, tower_revision=_revision(settings, tower), projector=said,
        select_layer=_layer(settings, "mm_vision_select_layer"),
        select_feature=_one_of(settings, "mm_vision_select_feature", "patch", "cls_patch"),
        merge=_one_of(settings, "mm_patch_merge_type", "flat", "spatial", "spatial_unpad"),
        aspect_ratio=_one_of(settings, "image_aspect_ratio", "square", "pad", "anyres"),
        grid_pinpoints=_sizes(settings), scales=_scales(settings),
        tower_trained=any(settings.flag(key) for key in TOWER_TRAINED), max_length=_max_length(settings),
    )  # fmt: skip


def _transformers(settings: Settings, projector: str) -> VLMSettings:
    settings.only("projector_hidden_act", "gelu")
    settings.only("multimodal_projector_bias", True)
    if projector == "identity":
        raise _without_projector(settings, "mlp2x_gelu")
    vision = settings.inner("vision_config") or Settings(settings.path, {})
    drops = _one_of(settings, "vision_feature_select_strategy", "default", "full") == "default"
    family = family_described(vision)
    has_class_token = family.config.has_class_token
    if drops and not has_class_token:
        raise WeightsError(settings.path, f"vision_feature_select_strategy 'default' drops the first patch of a "
                           f"{family.name} tower, which has no class token; 'full' is supported")  # fmt: skip
    is_next = settings.text("model_type") == "llava_next"
    return VLMSettings(
        tower=settings.text("mm_vision_tower") or vision.text("_name_or_path"), projector=projector,
        select_layer=_layer(settings, "vision_feature_layer"),
        select_feature="patch" if drops or not has_class_token else "cls_patch",
        merge="spatial_unpad" if is_next else "flat",
        aspect_ratio="anyres" if is_next else _one_of(settings, "image_aspect_ratio", "square", "pad"),
        grid_pinpoints=tuple((width, height) for height, width in _sizes(settings)) if is_next else (),
        tower_trained=True, max_length=_max_length(settings),
    )  # fmt: skip


def _without_projector(settings: Settings, kind: str) -> WeightsError:
    return WeightsError(
        settings.path, f"describes a projector of kind {kind}, and none is among the tensors",
        do="get all files of the model, its projector too",
    )  # fmt: skip


def _revision(settings: Settings, tower: str) -> str:
    """That of Imp's own copy of SigLIP."""
    return "imp" if settings.text("model_type") in IMP and (tower, "imp") in REVISIONS else ""


def _layer(settings: Settings, key: str) -> int:
    return settings.integer(key, most=MOST_LAYERS, least=-MOST_LAYERS, default=-2)


def _scales(settings: Settings) -> tuple[int, ...]:
    """S2's, where Bunny's use_s2 is true."""
    if not settings.flag("use_s2"):
        return ()
    if settings.text("image_aspect_ratio") == "anyres":
        raise WeightsError(settings.path, "use_s2 true is not supported with the tiles of image_aspect_ratio anyres")
    text = settings.text("s2_scales") or S2_SCALES
    scales = [scale.strip() for scale in text.split(",")]
    if not all(scale.isdecimal() and 0 < int(scale) <= MOST_PIXELS for scale in scales):
        raise WeightsError(settings.path, f"s2_scales is {text!r}; expected pixels, as {S2_SCALES}")
    return tuple(sorted(map(int, scales)))


def _max_length(settings: Settings) -> int | None:
    key = "tokenizer_model_max_length"
    return None if settings.values.get(key) is None else settings.integer(key, most=MOST_POSITIONS)


def _one_of(settings: Settings, key: str, *accepted: ChoiceT) -> ChoiceT:
    """The value of `key`, the first accepted one where it is absent."""
    value = settings.values.get(key)
    if value is None:
        return accepted[0]
    for choice in accepted:
        if value == choice:
            return choice
    raise WeightsError(settings.path, f"{key} {value!r} is not supported; accepted are {', '.join(accepted)}")


def _sizes(settings: Settings) -> tuple[Size, ...]:
    """image_grid_pinpoints in the file's order of sides: a list, or in old files a string of one."""
    value = settings.values.get("image_grid_pinpoints")
    if isinstance(value, str):
        with suppress(ValueError):  # refused below, as it was typed
            value = json.loads(value.replace("(", "[").replace(")", "]"))
    if value is None:
        return ()
    if isinstance(value, list) and len(value) <= MOST_SIZES and all(_is_size(size) for size in value):
        return tuple((first, second) for first, second in value)
    raise WeightsError(settings.path, f"image_grid_pinpoints is {value!r}; expected a list of pairs of pixels")


def _is_size(size: object) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MOST_PIXELS for side in size
    )  # fmt: skip
