"""Row-wise int8 weights in bitsandbytes' CB/SCB layout, weight only, and the frozen linear on them.

    scale[n] = max_k |w[n, k]|      codes[n, k] = round(w[n, k] * (127 / scale[n]))      w' = codes * scale / 127
    y[t, n] = sum_k x[t, k] w'[n, k] + bias[n]                          dx[t, k] = sum_n dy[t, n] w'[n, k]

1 + 4/K bytes a weight. The weight is frozen, so the backward needs no activation: only the codes are kept, and both
directions rebuild w' in the activation's dtype. Rounding is half to even; a row of zeros has scale 0 and codes 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import record

SMALLEST_SCALE = 1e-36  # 127 / scale overflows fp32 below 3.8e-37; the values of such a row round to nearly nothing


@dataclass(frozen=True, slots=True, eq=False)
class Int8Tensor:
    """A weight in 8 bits. `dtype` is what `dequantize_int8` returns by default."""

    codes: Tensor  # int8 [N, K], bitsandbytes' CB
    scale: Tensor  # fp32 [N], largest magnitude of each row, bitsandbytes' SCB
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.scale.nbytes

    def to(self, device: torch.device | str) -> Int8Tensor:
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))


@torch.no_grad()
def quantize_int8(weight: Tensor, name: str = "") -> Int8Tensor:
    """Quantize `weight` [N, K] (fp32, fp16 or bf16, finite) on its device, in fp32.

    Raises ValueError for another dtype or rank, for an empty weight, and for the first non-finite value, which it
    reports by `name` and index.
    """
    label = name or "weight"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{label}: int8 takes fp32, fp16 or bf16 weights, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{label}: int8 takes a non-empty matrix [N, K], got shape {tuple(weight.shape)}")
    scale = weight.abs().amax(dim=1).float()
    if not bool(torch.isfinite(scale).all()):
        where = torch.nonzero(~torch.isfinite(weight))[0].tolist()
        raise ValueError(
            f"{label}: value {weight[where[0], where[1]].item()} at {where}; int8 takes finite weights only"
        )
    factor = 127.0 / scale.clamp(min=SMALLEST_SCALE)
    codes = (weight.float() * factor[:, None]).round_().to(torch.int8)
    return Int8Tensor(codes=codes, scale=scale, dtype=weight.dtype)


@torch.no_grad()
def dequantize_int8(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] that `q` stores, in `dtype` (default: the dtype it was quantized from)."""
    return (q.codes.float() * q.scale[:, None]).mul_(1.0 / 127.0).to(dtype or q.dtype)


class _LinearInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Int8Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = q
        return F.linear(x, dequantize_int8(q, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        q: Int8Tensor = ctx.weight
        return grad @ dequantize_int8(q, grad.dtype), None, None


def linear_int8(x: Tensor, q: Int8Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the stored weight [N, K] -> [..., N] in x's dtype; `bias` [N] is frozen too."""
    if x.shape[-1] != q.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the int8 weight {tuple(q.shape)} takes {q.shape[1]}")
    if bias is not None and bias.requires_grad:
        raise ValueError("the bias of an int8 linear is frozen, got one that requires a gradient")
    record("linear_int8", "torch", "the only implementation")
    out: Tensor = _LinearInt8.apply(x, q, bias)  # type: ignore[no-untyped-call]
    return out
