"""Google's SigLIP in transformers' layout, of a SiglipModel or a SiglipVisionModel, with all its blocks or fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.vision.siglip import SiglipConfig
from models.weights.archive import Shape
from models.weights.settings import Settings
from models.weights.towers import hugging_face
from models.weights.towers.family import Family, InTransformers
from models.weights.towers.layout import Layout
from models.weights.towers.selection import make_config

HF = Layout(
    names=hugging_face.NAMES,
    unused={
        r"post_layernorm\.(weight|bias)": hugging_face.UNUSED,
        r"head\.(probe|attention\.(in_proj_|out_proj\.)(weight|bias)|(layernorm|mlp\.fc[12])\.(weight|bias))": (
            hugging_face.UNUSED
        ),
    },
    foreign=hugging_face.FOREIGN,
)
EXPORT = replace(HF, prefix=hugging_face.PREFIX)
MODEL_TYPES = ("siglip", "siglip_vision_model")


def config_of(settings: Settings, **selection: Any) -> SiglipConfig:
    """The tower in a SiglipModel's config.json (under vision_config) or a SiglipVisionModel's.

    Raises:
        WeightsError: another model, or a number out of range.
    """
    settings.only("model_type", *MODEL_TYPES)
    tower = settings.inner("vision_config") or settings
    tower.only("model_type", *MODEL_TYPES)
    tower.only("hidden_act", "gelu_pytorch_tanh")
    numbers = hugging_face.numbers(tower, norm_eps=1e-6, patch_size=16)
    return make_config(SiglipConfig, settings.path, numbers | selection)


def published_config(where: Path, shapes: Mapping[str, Shape], layout: Layout, **selection: Any) -> SiglipConfig:
    """The tower of a checkpoint that does not describe it (Bunny's, Imp's): one of Google's."""
    numbers = hugging_face.published_numbers(where, shapes, layout, class_tokens=0)
    return make_config(SiglipConfig, where, numbers | selection)


def settings_of(config: SiglipConfig) -> dict[str, Any]:
    """The config.json of a SiglipVisionModel, and the vision_config of what holds one."""
    return hugging_face.vision_config(config, "siglip_vision_model", "gelu_pytorch_tanh")


def preprocessor_of(config: SiglipConfig) -> dict[str, Any]:
    """The preprocessor_config.json of SigLIP's image processor."""
    return hugging_face.image_processor(config, "SiglipImageProcessor")


FAMILY = Family(config=SiglipConfig, export=EXPORT, in_transformers=InTransformers(
    model_types=MODEL_TYPES, settings_of=settings_of, preprocessor_of=preprocessor_of,
))  # fmt: skip
