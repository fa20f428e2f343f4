"""What a forward pass leaves for its backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]
T = TypeVar("T")


def kept_by(model: nn.Module, run: Callable[[], T]) -> tuple[T, Counter[Shape]]:
    """What `run` gives, and the shapes of what it leaves for the backward pass: each storage once, no parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned:
            found.setdefault(x.untyped_storage().data_ptr(), x)  # held, so that no other takes its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = run()
    return outputs, Counter(tuple(x.shape) for x in found.values())


def rows_kept(kept: Counter[Shape], rows: int) -> dict[Shape, int]:
    """Those of `rows` rows of more than eight numbers: no statistics, codes, routes."""
    return {shape: count for shape, count in kept.items() if shape[:1] == (rows,) and torch.Size(shape[1:]).numel() > 8}
