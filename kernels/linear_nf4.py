"""Linear layer on a frozen NF4 weight.

    y[t, n] = sum_k x[t, k] w[n, k] + bias[n]             dx[t, k] = sum_n dy[t, n] w[n, k]

x [..., K], y [..., N], w = dequantize_nf4(q) [N, K] in x's dtype. The weight and the bias are frozen: there is no dW,
so x is not saved; the backward dequantizes again. Traffic beyond the two matrix products: 2.516 bytes a weight and
direction at 16 bits. On the CPU the dequantization is torch's rule (kernels/nf4.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dequantize_nf4 import dequantize_nf4
from kernels.nf4 import NF4Tensor


class _LinearNF4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = q
        return F.linear(x, dequantize_nf4(q, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        q: NF4Tensor = ctx.weight
        return grad @ dequantize_nf4(q, grad.dtype), None, None


def linear_nf4(x: Tensor, q: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the stored weight [N, K] -> [..., N] in x's dtype; `bias` [N] is frozen too."""
    if x.shape[-1] != q.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the NF4 weight {q.shape} takes {q.shape[1]}")
    if bias is not None and bias.requires_grad:
        raise ValueError("the bias of an NF4 linear is frozen, got one that requires a gradient")
    out: Tensor = _LinearNF4.apply(x, q, bias)  # type: ignore[no-untyped-call]
    return out
