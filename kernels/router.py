"""The router of the MMA adapter, for the few tokens of a pack that route (two: one a modality).

    mix = softmax((n router_w^T + router_b) / temperature),  n = norm(stream[rows])         LaVIN, arXiv 2305.15023

Plain torch. norm_mma takes a `Router` in place of its weights `mix`, and then adds the gradient of these rows to the
one that it has just written. Left to autograd it would come as [T, D] of zeros with R rows in it, for the stream and
again for the delta, to be added to theirs: eight streams more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import wide
from kernels.layer_norm import layer_norm_reference
from kernels.rms_norm import rms_norm_reference


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Who routes, and how."""

    weight: Tensor  # fp32 [2, D]
    bias: Tensor  # fp32 [2]
    temperature: float
    rows: Tensor  # int64 [R], all different: the tokens whose norm routes


def router_mix(n_rows: Tensor, router_w: Tensor, router_b: Tensor, temperature: float) -> Tensor:
    """n_rows [R, D] normed rows of any float dtype; router_w [2, D], router_b [2] -> fp32 [R, 2]."""
    return torch.softmax((wide(n_rows) @ wide(router_w).T + wide(router_b)) / temperature, dim=-1)


def route(stream_rows: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, router: Router) -> Tensor:
    """stream_rows [R, D], the rows `router.rows` before the norm -> mix fp32 [R, 2]."""
    if norm_bias is None:
        n = rms_norm_reference(stream_rows, norm_weight, eps)
    else:
        n = layer_norm_reference(stream_rows, norm_weight, norm_bias, eps)
    return router_mix(n, router.weight, router.bias, router.temperature)


def route_backward(
    dmix: Tensor, mix: Tensor, stream_rows: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float,
    router: Router,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of stream_rows [R, D], router.weight [2, D] and router.bias [2] from that of mix [R, 2].

    dlogits = mix (dmix - sum(dmix mix)) / temperature; the norm's backward is that of kernels/norm.py.
    """
    x, weight = wide(stream_rows), wide(norm_weight)
    if norm_bias is not None:
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    xhat = x * rstd
    n = xhat * weight if norm_bias is None else xhat * weight + wide(norm_bias)
    dlogits = mix * (dmix - (dmix * mix).sum(-1, keepdim=True)) / router.temperature
    g = (dlogits @ wide(router.weight)) * weight
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if norm_bias is not None:
        dx = dx - g.mean(-1, keepdim=True)
    return (rstd * dx).to(stream_rows.dtype), dlogits.T @ n, dlogits.sum(0)
