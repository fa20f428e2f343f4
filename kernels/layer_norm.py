"""LayerNorm: y = (x - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450), alone or behind a residual add.

x [T, D] fp16, bf16 or fp32; weight, bias [D] in x's dtype, or in fp32 beside 16-bit activations, as in CLIP's tower.
Means and variance over D in fp32 (the variance of the centred row), the result rounded once.

The kernels, and the bytes that they move, are in norm.py. They exist for frozen weight and bias, whose backward is one
pass over the rows and spreads over the whole card at a tower's few tokens; for the residual stream's gradient, which
that pass takes along; and for Phi's parallel block, whose two branches read one norm: both gradients enter that pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import choose, wide
from kernels.norm import check_delta, norm


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D], bias [D] -> [T, D] in x's dtype, computed in fp32."""
    return F.layer_norm(wide(x), (x.shape[-1],), wide(weight), wide(bias), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the rows of x [T, D] and apply weight [D] and bias [D]; returns [T, D] in x's dtype.

    weight and bias have x's dtype or are fp32, and are applied in theirs.
    Gradients for x and, where they require one, weight and bias (summed in fp32, in a fixed order).
    Raises ValueError where shapes or dtypes do not fit.
    """
    return add_layer_norm(x, None, weight, bias, eps)[1]


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *, branches: int = 1
) -> tuple[Tensor, ...]:
    """(stream, layer_norm of it), stream = x + delta rounded to x's dtype, or x itself where there is no delta; [T, D].

    branches 2: (stream, y, y), one y for each reader, so that both gradients arrive in one backward.
    Use the stream that is returned, also without delta: its gradient is added in the norm's backward. delta has x's
    shape and dtype. Otherwise as `layer_norm`.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(
            f"layer_norm takes x [T, D], weight [D] and bias [D], "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if weight.dtype != bias.dtype or weight.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(
            f"layer_norm: x {x.dtype} wants weight and bias in that or in fp32, got {weight.dtype} and {bias.dtype}"
        )
    if branches not in (1, 2):
        raise ValueError(f"layer_norm has 1 or 2 branches, got {branches}")
    check_delta("layer_norm", x, delta)
    if choose("layer_norm", x, ("triton", "reference")) == "reference":
        stream = x if delta is None else x + delta
        return stream, *branches * (layer_norm_reference(stream, weight, bias, eps),)
    return norm(x, delta, weight, bias, eps, branches=branches)
