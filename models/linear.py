"""A linear layer whose weight is 16-bit (trained or frozen), row-wise int8, or NF4; a frozen one may carry LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.frozen_linear import input_gradient
from kernels.int8 import Int8Tensor, quantize_int8
from kernels.linear_int8 import linear_int8, linears_int8
from kernels.linear_nf4 import linear_nf4, linears_nf4
from kernels.lora_linear import LARGEST_GROUP, lora_linear_gradients, lora_linears
from kernels.nf4 import NF4Tensor, quantize_nf4
from models.quantized import Packed, QuantizedWeight

FrozenWeight = Tensor | Packed


class LoRA(nn.Module):
    """An update of low rank (arXiv 2106.09685): y += scaling * drop(x) A^T B^T, A `a` [r, in], B `b` [out, r], fp32.

    `site` numbers its dropout stream within the model.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float, site: int
    ) -> None:
        super().__init__()
        self.scaling, self.dropout, self.site = scaling, dropout, site
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.b = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32))

    def reset(self) -> None:
        """PEFT's start: the update is zero, since b is."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]; x [T, in], y [T, out] in x's dtype.

    A frozen weight gets no dW, so its input is never saved for the backward pass: dX = dY W needs W alone. LoRA is
    beside a frozen weight and bias; it saves x. A `seed` int64 [1] switches its dropout on.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(out_features)) if bias else None
        self.quantized: QuantizedWeight | None = None
        self.lora: LoRA | None = None

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

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        return self._linear(x, self.bias, seed)

    def _linear(self, x: Tensor, bias: Tensor | None, seed: Tensor | None) -> Tensor:
        if self.lora is not None:
            return _adapted(x, [self], [bias], seed)[0]
        weight = self.frozen_weight()
        if isinstance(weight, NF4Tensor):
            return linear_nf4(x, weight, bias)
        if isinstance(weight, Int8Tensor):
            return linear_int8(x, weight, bias)
        return F.linear(x, weight, bias)

    def product(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """y without the bias, for an op that adds it: [T, in] -> [T, out]."""
        return self._linear(x, None, seed)

    @property
    def trains_weight(self) -> bool:
        """Whether weight or bias is trained."""
        return any(p is not None and p.requires_grad for p in (self.weight, self.bias))

    def gradients(
        self, x: Tensor | None, dy: Tensor, seed: Tensor | None, *, needs_x: bool
    ) -> tuple[Tensor | None, dict[nn.Parameter, Tensor]]:
        """From the gradient of y [T, out], of a frozen weight: that of x [T, in] (None unless `needs_x`) and those of
        LoRA's parameters. Only LoRA reads x. Not differentiable."""
        lora, weight = self.lora, self.frozen_weight()
        if lora is None:
            return input_gradient((dy,), (weight,)) if needs_x else None, {}
        assert x is not None
        dx, da, db = lora_linear_gradients(
            x, dy, weight, lora.a, lora.b,
            scaling=lora.scaling, dropout=lora.dropout, seed=seed, site=lora.site, needs_x=needs_x,
        )  # fmt: skip
        return dx, {lora.a: da, lora.b: db}

    def extra_repr(self) -> str:
        storage = self.quantized.kind.__name__ if self.quantized is not None else "16/32-bit"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {storage}"


def linears(x: Tensor, *layers: Linear, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """Several layers on one x [T, in] -> [T, out_i] each, in tensors of their own: q/k/v, gate/up.

    Packed weights of one kind are one call: one unpacking (or one fused product), and dX is added up in place. So are
    the layers with LoRA, where their numbers agree.
    """
    found: dict[Linear, Tensor] = {}
    for members in calls(*layers):
        with_lora = members[0].lora is not None
        ys = _adapted(x, members, [layer.bias for layer in members], seed) if with_lora else _plain(x, members)
        found.update(zip(members, ys, strict=True))
    return tuple(found[layer] for layer in layers)


def calls(*layers: Linear) -> list[tuple[Linear, ...]]:
    """Layers on one x, those together that `linears` computes in one call.

    Those without LoRA; then those with LoRA of one rank, scaling and dropout, at sites that follow one another.
    """

    def numbers(indexed: tuple[int, tuple[Linear, LoRA]]) -> tuple[float, ...]:
        order, (_, lora) = indexed
        return order // LARGEST_GROUP, lora.a.shape[0], lora.scaling, lora.dropout, lora.site - order

    plain = tuple(layer for layer in layers if layer.lora is None)
    with_lora = [(layer, layer.lora) for layer in layers if layer.lora is not None]
    groups = groupby(enumerate(with_lora), numbers)
    return [plain] * bool(plain) + [tuple(layer for _, (layer, _) in group) for _, group in groups]


def pack_of(layers: Sequence[Linear]) -> tuple[Packed, ...]:
    """The packed weights of the layers that have one."""
    return tuple(layer.quantized.packed() for layer in layers if layer.quantized is not None)


def _plain(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Those without LoRA."""
    weights, biases = pack_of(layers), [layer.bias for layer in layers]
    nf4 = [weight for weight in weights if isinstance(weight, NF4Tensor)]
    int8 = [weight for weight in weights if isinstance(weight, Int8Tensor)]
    if len(nf4) == len(layers):
        return linears_nf4(x, nf4, biases)
    if len(int8) == len(layers):
        return linears_int8(x, int8, biases)
    return tuple(layer(x) for layer in layers)


def _adapted(
    x: Tensor, layers: Sequence[Linear], biases: Sequence[Tensor | None], seed: Tensor | None
) -> tuple[Tensor, ...]:
    """Those with LoRA, in one call."""
    loras = [layer.lora for layer in layers if layer.lora is not None]
    first = loras[0]
    return lora_linears(
        x, [layer.frozen_weight() for layer in layers], [None if b is None else b.to(x.dtype) for b in biases],
        [lora.a for lora in loras], [lora.b for lora in loras],
        scaling=first.scaling, dropout=first.dropout, seed=seed, site=first.site,
    )  # fmt: skip
