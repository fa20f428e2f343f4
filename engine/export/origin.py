"""What is exported: a base whose weights stay in their files, and the tensors that were trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.weights.source import LanguageSource, VisionSource
from models.weights.vlm_settings import VLMSettings

Stage = Literal["none", "projector", "lora", "full", "mma"]


@dataclass(frozen=True, kw_only=True)
class LoRATensors:
    """A LoRA by our names within its part of the model: `layers.0.attention.q.lora.a`."""

    tensors: Mapping[str, Tensor]
    config: LoRAConfig


@dataclass(frozen=True, kw_only=True)
class MMATensors:
    """What LaVIN trains, by our names in the whole model, and how its command line would say it."""

    tensors: Mapping[str, Tensor]
    epoch: int
    args: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model, opened. Whole trained tensors take the place of the files' ones; a LoRA is added to them or stays apart.

    Where a part is None or empty the model does not have it: a language model alone has no tower.
    """

    name: str  # as a person typed it, for messages
    stage: Stage  # what was trained: the most of it
    language: LanguageSource
    language_trained: Mapping[str, Tensor] = field(default_factory=dict)  # our names within the language model
    language_lora: LoRATensors | None = None
    vision: VisionSource | None = None
    vision_trained: Mapping[str, Tensor] = field(default_factory=dict)
    vision_lora: LoRATensors | None = None
    projector: Mapping[str, Tensor] = field(default_factory=dict)  # our names within the projector
    image_newline: Tensor | None = None  # [D]
    mma: MMATensors | None = None
    settings: VLMSettings | None = None
    projector_lr: float | None = None
    template: str = ""  # the conversation that it was trained with; empty: that of other projects with such models
    base: str = ""  # what a LoRA or projector alone has to be put on, as a person named it
    folders: Sequence[Path] = ()  # where its tokenizer's and settings' files may lie, the first that has one counts

    def close(self) -> None:
        """Lets go of every file."""
        self.language.close()
        if self.vision is not None:
            self.vision.close()
