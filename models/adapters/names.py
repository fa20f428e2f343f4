"""Which tensors of a model are an adapter's, by their names."""

from __future__ import annotations


def is_adapter(name: str) -> bool:
    """Whether the tensor of this name is part of an adapter (MMA, RepAdapter or LoRA) and not of a base model."""
    return "_adapter." in name or ".lora." in name
