"""What is said of every family of towers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.vision.tower import TowerConfig
from models.weights.towers.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class InTransformers:
    """How transformers describes a family of its own."""

    model_types: tuple[str, ...]  # of a config.json or a vision_config
    settings_of: Callable[[Any], dict[str, Any]]  # the family's config -> config.json of such a tower alone
    preprocessor_of: Callable[[Any], dict[str, Any]]  # the same -> preprocessor_config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How checkpoints of vision-language models hold a family, and how transformers describes it, if it has it."""

    config: type[TowerConfig]
    export: Layout  # its names behind `vision_tower.`
    in_transformers: InTransformers | None = None

    @property
    def name(self) -> str:
        return self.config.family
