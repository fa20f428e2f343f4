"""A vision tower as its own project names it, whole: also the blocks, norms and pooling heads that are not run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.vision.config import TowerConfig
from models.weights.source import VisionSource
from models.weights.towers import unused_tensors
from models.weights.towers.family import InTransformers
from models.weights.towers.open import export_layout
from models.weights.towers.registry import FAMILIES
from models.weights.write.entries import Entries, Entry, changed, tensor_entries
from models.weights.write.vlm import TowerPart

IN_TRANSFORMERS: Mapping[str, InTransformers] = {  # families that it has a class for
    family.name: family.in_transformers for family in FAMILIES if family.in_transformers is not None
}


def tower_part(source: VisionSource, entries: Entries, dtype: torch.dtype) -> TowerPart:
    """A tower of which `entries` are the tensors that run, under our names (a LoRA may be merged into them), and
    `source` what else it has."""
    layout = export_layout(source.config)
    run = {layout.of(name): _as_theirs(entry, layout.leading.get(name, ())) for name, entry in entries.items()}
    every = run | tensor_entries(dict(unused_tensors(source)), dtype)  # those are views of a mapped file
    last = layout.prefix + layout.names.layer.format(source.config.num_layers - 1)
    has_all = any(name.startswith(last) for name in every)
    return TowerPart(config=source.config, entries=every, has_all_layers=has_all)


def tower_settings(config: TowerConfig) -> dict[str, Any]:
    """The vision_config of transformers."""
    return IN_TRANSFORMERS[config.family].settings_of(config)


def image_settings(config: TowerConfig) -> dict[str, Any]:
    """The preprocessor_config.json of the tower's own image processor."""
    return IN_TRANSFORMERS[config.family].preprocessor_of(config)


def _as_theirs(entry: Entry, leading: tuple[int, ...]) -> Entry:
    if not leading:
        return entry
    shape = (*leading, *entry.shape)
    return changed(entry, partial(_reshaped, shape), shape)


def _reshaped(shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    return tensor.reshape(shape)
