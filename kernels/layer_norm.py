"""LayerNorm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, fp32 statistics.

torch's own kernel: the towers' LayerNorms without an adapter are the only callers (with one, see norm_mma).
x [T, D] any float dtype; weight, bias [D] in the same, or in fp32. Bytes: x read once, y written once. With fp32 affine
parameters a 16-bit x goes through fp32, but it is x itself that is saved for the backward, and converted again there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import record, wide


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D], bias [D] -> [T, D] in x's dtype, computed in fp32."""
    return F.layer_norm(wide(x), (x.shape[-1],), wide(weight), wide(bias), eps).to(x.dtype)


class _WideLayerNorm(torch.autograd.Function):
    """In fp32, whatever x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(wide(x), weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            wide(dy), wide(x), weight.shape, mean, rstd, weight, bias, ctx.needs_input_grad[:3]
        )
        return None if dx is None else dx.to(x.dtype), dweight, dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the rows of x [T, D] and apply weight [D] and bias [D]; returns [T, D] in x's dtype.

    weight and bias have x's dtype or are fp32 (in a 16-bit tower), and are applied in theirs.
    Raises ValueError where shapes or dtypes do not fit.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"layer_norm: x {tuple(x.shape)} wants weight and bias ({x.shape[-1]},), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if weight.dtype != bias.dtype or weight.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(f"layer_norm: x {x.dtype} wants weight and bias in that or in fp32, got {weight.dtype}")
    record("layer_norm", "torch", "the only implementation")
    if weight.dtype == x.dtype:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return cast(Tensor, _WideLayerNorm.apply(x, weight, bias, eps))  # type: ignore[no-untyped-call]
