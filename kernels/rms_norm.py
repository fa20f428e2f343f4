"""RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps) (arXiv 1910.07467), alone or behind a residual add.

x [T, D] fp16, bf16 or fp32, weight [D] 16 or 32 bits whatever x is; statistics in fp32. The result is rounded once, or
twice as in LLaMA: x * rstd to x's dtype before the weight multiplies it. So 16-bit results are those of the models that
we load: twice for LLaMA, Vicuna and Phi-3, once for Gemma (and in torch's F.rms_norm).

The kernels, and the bytes that they move, are in norm.py. They exist for the frozen weight, which is the usual case:
its backward is one pass that takes the residual stream's gradient along, without the sum over tokens for dweight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import choose, wide
from kernels.norm import check_delta, norm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, cast_before_weight: bool = True) -> Tensor:
    """x [T, D], weight [D] -> [T, D] in x's dtype."""
    x32 = wide(x)
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        normed = wide(normed.to(x.dtype))
    return (normed * wide(weight)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, cast_before_weight: bool = True) -> Tensor:
    """Scale the rows of x [T, D] to unit mean square and multiply by weight [D]; returns [T, D] in x's dtype.

    cast_before_weight: round to x's dtype before the weight too (LLaMA), or only after it.
    Gradients for x and, where it requires one, weight (summed in fp32, in a fixed order).
    Raises ValueError where the shapes do not fit.
    """
    return add_rms_norm(x, None, weight, eps, cast_before_weight=cast_before_weight)[1]


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, cast_before_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """(stream, rms_norm of it), stream = x + delta rounded to x's dtype, or x itself where there is no delta; [T, D].

    Use the stream that is returned, also without delta: its gradient is added in the norm's backward. delta has x's
    shape and dtype. Otherwise as `rms_norm`.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"rms_norm takes x [T, D] and weight [D], got {tuple(x.shape)} and {tuple(weight.shape)}")
    check_delta("rms_norm", x, delta)
    if choose("rms_norm", x, ("triton", "reference")) == "reference":
        stream = x if delta is None else x + delta
        return stream, rms_norm_reference(stream, weight, eps, cast_before_weight=cast_before_weight)
    stream, y = norm(x, delta, weight, None, eps, cast_before_weight=cast_before_weight)
    return stream, y
