"""A linear layer whose weight is 16-bit (trained or frozen), row-wise int8, or NF4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.frozen_linear import input_gradient
from kernels.int8 import Int8Tensor, quantize_int8
from kernels.linear_int8 import linear_int8, linears_int8
from kernels.linear_nf4 import linear_nf4, linears_nf4
from kernels.nf4 import NF4Tensor, quantize_nf4
from models.quantized import Packed, QuantizedWeight

FrozenWeight = Tensor | Packed


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]; x [T, in], y [T, out] in x's dtype.

    A frozen weight gets no dW, so its input is never saved for the backward pass: dX = dY W needs W alone.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(out_features)) if bias else None
        self.quantized: QuantizedWeight | None = None

    def quantize(self, weight: Tensor, *, bits: int, device: torch.device, name: str) -> None:
        """Stores a [out, in] weight, frozen, in 4 or 8 bits on `device`.

        The rule works on the weight in its file's dtype, before any cast to the compute dtype.
        """
        weight = weight.to(device)
        self.hold(quantize_nf4(weight, name) if bits == 4 else quantize_int8(weight, name))

    def hold(self, weight: Packed) -> None:
        """Takes a weight [out, in] that is quantised already; frozen."""
        self.quantized = QuantizedWeight(weight)
        self.weight = None

    def frozen_weight(self) -> FrozenWeight:
        """The weight as it is stored, for operations that take any storage."""
        if self.quantized is not None:
            return self.quantized.packed()
        assert self.weight is not None
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.bias)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.frozen_weight()
        if isinstance(weight, NF4Tensor):
            return linear_nf4(x, weight, bias)
        if isinstance(weight, Int8Tensor):
            return linear_int8(x, weight, bias)
        return F.linear(x, weight, bias)

    def product(self, x: Tensor) -> Tensor:
        """x W^T without the bias, for an op that adds it: [T, in] -> [T, out]."""
        return self._linear(x, None)

    @property
    def is_frozen(self) -> bool:
        """Whether neither weight nor bias is trained."""
        return not any(p is not None and p.requires_grad for p in (self.weight, self.bias))

    def input_gradient(self, dy: Tensor) -> Tensor:
        """The gradient of x [T, in] from that of y [T, out], of a frozen layer; not differentiable."""
        return input_gradient((dy,), (self.frozen_weight(),))

    def extra_repr(self) -> str:
        storage = self.quantized.kind.__name__ if self.quantized is not None else "16/32-bit"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {storage}"


def linears(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers on one x [T, in] -> [T, out_i] each, in tensors of their own: q/k/v, gate/up.

    Packed weights of one kind are one call: one unpacking (or one fused product), and dX is added up in place.
    """
    weights, biases = pack_of(layers), [layer.bias for layer in layers]
    nf4 = [weight for weight in weights if isinstance(weight, NF4Tensor)]
    int8 = [weight for weight in weights if isinstance(weight, Int8Tensor)]
    if len(nf4) == len(layers):
        return linears_nf4(x, nf4, biases)
    if len(int8) == len(layers):
        return linears_int8(x, int8, biases)
    return tuple(layer(x) for layer in layers)


def pack_of(layers: Sequence[Linear]) -> tuple[Packed, ...]:
    """The packed weights of the layers that have one."""
    return tuple(layer.quantized.packed() for layer in layers if layer.quantized is not None)
