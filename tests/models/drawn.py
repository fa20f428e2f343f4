"""Random numbers in models: every tensor drawn anew, and a model filled from another's as loading does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.adapters.names import is_adapter
from models.placement import fill
from models.quantized import Packed

CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)


def drawn(module: M, seed: int = 0) -> M:
    """`module` with every tensor drawn anew, so that no path is switched off: norms around one, biases that count,
    matrices that keep the size of their input (so a table that is the head too), routers that take sides."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        elif parameter.ndim == 1 or "embedding" in name or name.endswith("embed.weight"):
            noise *= 0.5
        else:
            noise *= (4.0 if ".router." in name else 1.0) / parameter[0].numel() ** 0.5
        parameter.data.copy_(noise)
    return module


def frozen_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What a base file of this part would hold: all but adapters."""
    return ((name, p.data) for name, p in module.named_parameters() if not is_adapter(name))


def filled(
    module: M, stream: Iterable[tuple[str, Tensor | Packed]], bits: Callable[[str], int] = lambda name: 16,
    dtype: torch.dtype = torch.float32,
) -> M:  # fmt: skip
    """`module`, which is on the meta device, with these tensors, its linears in `bits` of their names."""
    fill(module, stream, bits=bits, device=CPU, dtype=dtype, source="test")
    return module
