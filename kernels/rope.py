"""Rotary position embedding of q and k in one op (RoFormer, arXiv 2104.09864).

Pair i of a head at position p turns by the angle p * theta^(-2i/d):

    a' = a cos - b sin        b' = a sin + b cos        backward: the same turn with -sin

`interleaved` says where a pair lies in the head: (2i, 2i + 1) in Meta's LLaMA files, (i, i + d/2) in Hugging Face's.
q [T, H, d] and k [T, G, d] fp16, bf16 or fp32; table fp32 [P, d/2]; position_ids integer [T]. Maths in fp32, one
rounding to the dtype at the end. Only references to table and positions are saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import record


def rope_table(
    head_dim: int, positions: int, theta: float, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, head_dim / 2]. Angles are taken in fp32, as LLaMA does."""
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / (theta**exponent)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, d] turned by cos, sin [T, d/2], whose fp32 makes the products fp32."""
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, d/2]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        cos, sin = cos[position_ids], sin[position_ids]
        return rope_reference(q, cos, sin, interleaved), rope_reference(k, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        cos, sin, position_ids = ctx.saved_tensors
        cos, sin = cos[position_ids], -sin[position_ids]
        turned = (rope_reference(grad, cos, sin, ctx.interleaved) for grad in (dq, dk))
        return next(turned), next(turned), None, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Turn q [T, H, d] and k [T, G, d] by the rows `position_ids` [T] of the table cos, sin [P, d/2].

    The table is not trained. Raises ValueError where the shapes do not fit.
    """
    half = cos.shape[-1]
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[-1] != 2 * half or k.shape[-1] != 2 * half:
        raise ValueError(
            f"rope takes q [T, H, d], k [T, G, d] with d = {2 * half}, twice the table's width; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if position_ids.shape != q.shape[:1]:
        raise ValueError(f"position_ids must be [{q.shape[0]}], got {tuple(position_ids.shape)}")
    record("rope", "torch", "the only implementation")
    out: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin, position_ids, interleaved)  # type: ignore[no-untyped-call]
    return out
