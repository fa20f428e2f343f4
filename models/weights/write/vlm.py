"""A vision-language model in parts, each under the names that the formats share, before it becomes one format's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from models.language.config import DecoderConfig
from models.vision.config import TowerConfig
from models.weights.vlm_settings import VLMSettings
from models.weights.write.entries import Entries, Entry


@dataclass(frozen=True, kw_only=True)
class LanguagePart:
    """A language model: `entries` under our names in `dtype`, and what the config.json of its source says."""

    config: DecoderConfig
    entries: Entries
    dtype: torch.dtype
    said: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TowerPart:
    """A tower: `entries` under the names of its own project (`vision_model.pre_layrnorm.weight`, EVA's
    `model.patch_embed.proj.weight`), with the blocks and norms that are not run, where its source has them."""

    config: TowerConfig
    entries: Entries
    has_all_layers: bool  # False: an Imp checkpoint, which ends with the last layer that is run


@dataclass(frozen=True, kw_only=True)
class VLMParts:
    """All that a checkpoint in LLaVA's, Bunny's or transformers' format holds."""

    language: LanguagePart
    tower: TowerPart
    projector: Entries  # our names: layers.0.weight
    image_newline: Entry | None
    settings: VLMSettings
