"""Which dtype exported weights have."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.export.config import Precision
from engine.export.origin import Origin
from engine.precision import DTYPES


def export_dtype(origin: Origin, asked: Precision) -> torch.dtype:
    """The dtype of written weights: the flag's, else that of the base's files."""
    if asked != "auto":
        return DTYPES[asked]
    embedding = origin.language.fetch("embed.weight")
    assert isinstance(embedding, Tensor)  # no format quantizes it
    return embedding.dtype


def tower_dtype(origin: Origin) -> torch.dtype:
    """The dtype of the tower's files."""
    assert origin.vision is not None
    return origin.vision.fetch("patch_embed.weight").dtype
