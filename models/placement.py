"""Fills a model that was built on the meta device, one tensor at a time: quantised, cast and placed as it arrives.

Host and device peaks are the model as it is stored plus one tensor; nothing is ever whole in 16 bits. Where a module
says `keeps_fp32`, its own tensors are not cast: they are small, and rounding them would be for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from models.linear import Linear
from models.weights.errors import WeightsError


def fill(
    module: nn.Module, stream: Iterable[tuple[str, Tensor]], *, bits: Callable[[str], int], device: torch.device,
    dtype: torch.dtype, source: str, on_tensor: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Gives `module` its frozen weights.

    `stream` yields (name within the module, tensor in its file's dtype); `bits` says for a linear's weight how it is
    stored (4, 8 or 16). Parameters that need a gradient keep it. Adapters, which no base file holds, are not expected.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape; the message lists them. Or a value is not
            finite where the weight is quantised.
    """
    expected = {name: p.shape for name, p in module.named_parameters() if "_adapter." not in name}
    extra: list[str] = []
    mismatched: list[str] = []
    for name, tensor in stream:
        shape = expected.pop(name, None)
        if shape is None:
            extra.append(name)
        elif shape != tensor.shape:
            mismatched.append(f"{name}: file {tuple(tensor.shape)}, model {tuple(shape)}")
        else:
            try:
                _place(module, name, tensor, bits(name), device, dtype)
            except ValueError as error:
                raise WeightsError(source, str(error), do="copy the weights again") from error
            if on_tensor is not None:
                on_tensor(name)
    if expected or extra or mismatched:
        raise WeightsError(source, missing=sorted(expected), extra=extra, mismatched=mismatched)


def _place(module: nn.Module, name: str, tensor: Tensor, bits: int, device: torch.device, dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if isinstance(owner, Linear) and leaf == "weight" and bits < 16:
        owner.quantize(tensor, bits=bits, device=device, name=name)
        return
    dtype = torch.float32 if getattr(owner, "keeps_fp32", False) else dtype
    new = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=old.requires_grad)
    setattr(owner, leaf, new)
