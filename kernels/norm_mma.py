"""Norm and MMA adapter in one op: y = n + scale * (m0 * e0 + m1 * e1), n = norm(x) (LaVIN, arXiv 2305.15023).

    u    = drop(n down_w^T + down_b)                                              the code, [T, h], h = 8 in LaVIN
    e_p  = [u[:, :h/2] up_p_w[:D/2]^T ; u[:, h/2:] up_p_w[D/2:]^T] + up_p_b       path p of 2, two groups of channels
    m    = mix[row]                                                               the router's weights, see router_mix

norm is RMSNorm (norm_bias None) or LayerNorm with frozen affine parameters. x fp16, bf16 or fp32 [T, D]; adapter
parameters and mix fp32; sums in fp32. The adapter is linear in n, so both paths are one product: with
W = [up_0 ; up_1] as [2h, D] (zero outside a code's group) and v = [m0 * u ; m1 * u] as [T, 2h], y = n + scale * (v W +
m0 * up0_b + m1 * up1_b). 2h = 16 fills the smallest tensor-core tile.

    forward    one program for a block of rows; reads x (again from cache), writes y, rstd (mean), u       2 streams
    backward   dv = scale * dy W^T; du = dv * [m0 ; m1] * mask; dn = dy + du [down_w ; down_w]; then the norm's own
               backward. Reads dy and x, writes dx, du [T, 2h] and each token's gradient of m [T, 2]       3 streams
    dadapter   gradients of the six adapter parameters from dy, n, u, du: fp32 partial sums over fixed chunks of
               tokens, added in order; no atomics, so runs repeat bit for bit                              2 streams
    dmix       sums tokens' gradients of m over the tokens of each router row, in order

Eager torch needs more than a dozen launches and as many passes over [T, D] for this.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import norm_mma_kernels
from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide
from kernels.dropout import keep_mask, threshold
from kernels.layer_norm import layer_norm_reference
from kernels.rms_norm import rms_norm_reference


def norm_mma_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    adapter: list[Tensor],
    mix: Tensor,
    row: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Plain torch; shapes as in `norm_mma`, adapter = [down_w, down_b, up0_w, up0_b, up1_w, up1_b]."""
    down_w, down_b, up0_w, up0_b, up1_w, up1_b = adapter
    if norm_bias is None:
        n = wide(rms_norm_reference(x, norm_weight, eps))
    else:
        n = wide(layer_norm_reference(x, norm_weight, norm_bias, eps))
    u = n @ down_w.T + down_b  # [T, h]
    if dropout > 0.0 and seed is not None:
        u = u * keep_mask(seed, site, u.shape[0], u.shape[1], dropout, u.device) / (1.0 - dropout)
    m = mix if row is None else mix[row.long()]  # [T, 2]
    first, second = u.chunk(2, dim=-1)  # [T, h/2] each
    (top0, bottom0), (top1, bottom1) = up0_w.chunk(2), up1_w.chunk(2)  # [D/2, h/2] each
    e0 = torch.cat((first @ top0.T, second @ bottom0.T), dim=-1) + up0_b  # [T, D]
    e1 = torch.cat((first @ top1.T, second @ bottom1.T), dim=-1) + up1_b
    return (n + scale * (m[:, :1] * e0 + m[:, 1:] * e1)).to(x.dtype)


def _codes(adapter: list[Tensor], x: Tensor) -> dict[str, Any]:
    """Compile-time arguments that depend on the code's width and on the dtype."""
    h = adapter[0].shape[0]
    exact = x.dtype == torch.float32  # tf32 keeps 16-bit activations exactly, and parameters better than 16 bits would
    return {"H": h, "K": max(16, triton.next_power_of_2(2 * h)), "PRECISION": "ieee" if exact else "tf32"}


def _dropout(dropout: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Seed, threshold and scale of the kept values, as the kernels take them."""
    return (seed, threshold(dropout), 1.0 / (1.0 - dropout)) if dropout > 0.0 else (None, 0, 1.0)


def _forward_outputs(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, adapter: list[Tensor], *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    mean = x.new_empty(0 if norm_bias is None else tokens, dtype=torch.float32)
    rstd = x.new_empty(tokens, dtype=torch.float32)
    return x.new_empty(x.shape), mean, rstd, x.new_empty(tokens, adapter[0].shape[0], dtype=torch.float32)


@primitive(
    "norm_mma_forward(Tensor x, Tensor norm_weight, Tensor? norm_bias, float eps, Tensor[] adapter, Tensor mix, "
    "Tensor? row, float scale, float dropout, Tensor? seed, int site) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_outputs,
)
def norm_mma_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    adapter: list[Tensor],
    mix: Tensor,
    row: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with unit last stride, all else contiguous -> y [T, D], mean [T] (RMSNorm: [0]), rstd [T], u [T, h] fp32."""
    y, mean, rstd, u = _forward_outputs(x, norm_weight, norm_bias, eps, adapter)
    tokens, channels = x.shape
    config = launch("norm_mma_forward", channels, x)
    seed, limit, kept_scale = _dropout(dropout, seed)
    run(
        norm_mma_kernels.norm_mma_forward_kernel,
        (triton.cdiv(tokens, config.rows),),
        config,
        x,
        norm_weight,
        norm_bias,
        *adapter,
        mix,
        row,
        seed,
        y,
        mean,
        rstd,
        u,
        x.stride(0),
        tokens,
        channels,
        eps,
        scale,
        site,
        limit,
        kept_scale,
        **_codes(adapter, x),
    )
    return y, mean, rstd, u


def _backward_outputs(
    dy: Tensor, x: Tensor, norm_weight: Tensor, adapter: list[Tensor], *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, h = x.shape[0], adapter[0].shape[0]
    fp32 = torch.float32
    return x.new_empty(x.shape), x.new_empty(tokens, 2 * h, dtype=fp32), x.new_empty(tokens, 2, dtype=fp32)


@primitive(
    "norm_mma_backward(Tensor dy, Tensor x, Tensor norm_weight, Tensor[] adapter, Tensor mix, Tensor? row, "
    "float scale, float dropout, Tensor? seed, int site, Tensor mean, Tensor rstd, Tensor u, bool layer_norm) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_outputs,
)
def norm_mma_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    adapter: list[Tensor],
    mix: Tensor,
    row: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    u: Tensor,
    layer_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx [T, D], du [T, 2h] fp32 (of the two copies of the code), dm [T, 2] fp32."""
    dx, du, dm = _backward_outputs(dy, x, norm_weight, adapter)
    tokens, channels = x.shape
    config = launch("norm_mma_backward", channels, x)
    seed, limit, kept_scale = _dropout(dropout, seed)
    down_w, _, *ups = adapter
    run(
        norm_mma_kernels.norm_mma_backward_kernel,
        (triton.cdiv(tokens, config.rows),),
        config,
        dy,
        x,
        norm_weight,
        down_w,
        *ups,
        mix,
        row,
        seed,
        mean,
        rstd,
        u,
        dx,
        du,
        dm,
        dy.stride(0),
        x.stride(0),
        tokens,
        channels,
        scale,
        site,
        limit,
        kept_scale,
        LAYER_NORM=layer_norm,
        **_codes(adapter, x),
    )
    return dx, du, dm


def _dadapter_outputs(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, adapter: list[Tensor], *_: object
) -> Tensor:
    return x.new_empty(sum(parameter.numel() for parameter in adapter), dtype=torch.float32)


@primitive(
    "norm_mma_dadapter(Tensor dy, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor[] adapter, Tensor mix, "
    "Tensor? row, float scale, Tensor mean, Tensor rstd, Tensor u, Tensor du) -> Tensor",
    fake=_dadapter_outputs,
)
def norm_mma_dadapter(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    adapter: list[Tensor],
    mix: Tensor,
    row: Tensor | None,
    scale: float,
    mean: Tensor,
    rstd: Tensor,
    u: Tensor,
    du: Tensor,
) -> Tensor:
    """-> gradients of the adapter's parameters, flattened, in their order; fp32."""
    tokens, channels = x.shape
    config = launch("norm_mma_dadapter", channels, x)
    chunks = triton.cdiv(tokens, config.chunk)
    partial = u.new_empty(chunks, sum(parameter.numel() for parameter in adapter))
    run(
        norm_mma_kernels.norm_mma_dadapter_kernel,
        (triton.cdiv(channels, config.cols), chunks),
        config,
        dy,
        x,
        norm_weight,
        norm_bias,
        mix,
        row,
        mean,
        rstd,
        u,
        du,
        partial,
        dy.stride(0),
        x.stride(0),
        tokens,
        channels,
        scale,
        **_codes(adapter, x),
    )
    return partial.sum(0)


def _dmix_outputs(dm: Tensor, row: Tensor, router_rows: int) -> Tensor:
    return dm.new_empty(router_rows, 2)


@primitive("norm_mma_dmix(Tensor dm, Tensor row, int router_rows) -> Tensor", fake=_dmix_outputs)
def norm_mma_dmix(dm: Tensor, row: Tensor, router_rows: int) -> Tensor:
    """dm [T, 2], row [T] -> [R, 2]: the sum over the tokens of each router row."""
    dmix = _dmix_outputs(dm, row, router_rows)
    config = launch("norm_mma_dmix", router_rows, dm)
    run(
        norm_mma_kernels.norm_mma_dmix_kernel,
        (triton.cdiv(router_rows, config.cols),),
        config,
        dm,
        row,
        dmix,
        dm.shape[0],
        router_rows,
    )
    return dmix


class _NormMMA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        mix: Tensor,
        row: Tensor | None,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        site: int,
        *adapter: Tensor,
    ) -> Tensor:
        y, *statistics = norm_mma_forward(
            x, norm_weight, norm_bias, eps, list(adapter), mix, row, scale, dropout, seed, site
        )  # fmt: skip
        ctx.save_for_backward(x, norm_weight, norm_bias, mix, row, seed, *statistics, *adapter)
        ctx.options = scale, dropout, site
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mix, row, seed, mean, rstd, u, *adapter = ctx.saved_tensors
        scale, dropout, site = ctx.options
        dy = unit_stride(dy)
        dx, du, dm = norm_mma_backward(
            dy, x, norm_weight, adapter, mix, row, scale, dropout, seed, site, mean, rstd, u, norm_bias is not None
        )  # fmt: skip
        dmix: Tensor | None = None
        if ctx.needs_input_grad[4]:
            dmix = dm if row is None else norm_mma_dmix(dm, row, mix.shape[0])
        dadapter: list[Tensor | None] = [None] * 6
        if any(ctx.needs_input_grad[10:]):
            flat = norm_mma_dadapter(dy, x, norm_weight, norm_bias, adapter, mix, row, scale, mean, rstd, u, du)
            parts = torch.split(flat, [parameter.numel() for parameter in adapter])
            dadapter = [part.view_as(parameter) for part, parameter in zip(parts, adapter, strict=True)]
        return dx, None, None, None, dmix, None, None, None, None, None, *dadapter


def router_mix(n_rows: Tensor, router_w: Tensor, router_b: Tensor, temperature: float) -> Tensor:
    """MMA's router: softmax((n_rows router_w^T + router_b) / temperature), plain torch (a few rows a pack).

    n_rows [R, D] normed rows of any float dtype; router_w [2, D], router_b [2]. Returns fp32 [R, 2].
    """
    return torch.softmax((wide(n_rows) @ wide(router_w).T + wide(router_b)) / temperature, dim=-1)


def norm_mma(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    down_w: Tensor,
    down_b: Tensor,
    up0_w: Tensor,
    up0_b: Tensor,
    up1_w: Tensor,
    up1_b: Tensor,
    mix: Tensor,
    row: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Norm the rows of x [T, D] and add the two adapter paths; returns [T, D] in x's dtype (formula: top of the file).

    norm_weight [D]; norm_bias [D] for LayerNorm, None for RMSNorm. down_w [h, D], down_b [h], up*_w [D, h/2],
    up*_b [D], mix [R, 2]: fp32, D and h even. row int32 or int64 [T]: each token's row of mix (in range: not checked);
    None: token t has row t and R = T. The code is dropped out with probability `dropout` where a seed (int64 [1], on
    x's device) is given; `site` tells this dropout from the model's others.
    Gradients for x, the adapter parameters and mix, none for the norm's.
    Raises ValueError where shapes or dtypes do not fit, or where a norm parameter asks for a gradient.
    """
    adapter = (down_w, down_b, up0_w, up0_b, up1_w, up1_b)
    _check(x, norm_weight, norm_bias, adapter, mix, row, dropout)
    if choose("norm_mma", x, ("triton", "reference")) == "reference":
        return norm_mma_reference(
            x, norm_weight, norm_bias, eps, list(adapter), mix, row, scale, dropout, seed, site
        )  # fmt: skip
    y = _NormMMA.apply(  # type: ignore[no-untyped-call]
        unit_stride(x), norm_weight.contiguous(), None if norm_bias is None else norm_bias.contiguous(), eps,
        mix.contiguous(), None if row is None else row.contiguous(), scale,
        0.0 if seed is None else dropout, seed if dropout > 0.0 else None, site,
        *(parameter.contiguous() for parameter in adapter),
    )  # fmt: skip
    return cast(Tensor, y)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    adapter: tuple[Tensor, ...],
    mix: Tensor,
    row: Tensor | None,
    dropout: float,
) -> None:
    threshold(dropout)  # its range
    tokens, channels = x.shape
    h = adapter[0].shape[0]
    if channels % 2 or h % 2:
        raise ValueError(f"norm_mma needs an even width and an even code, got D {channels}, h {h}")
    up = ((channels, h // 2), (channels,))
    expected = ((h, channels), (h,), *up, *up)
    got = tuple(tuple(parameter.shape) for parameter in adapter)
    if got != expected:
        raise ValueError(f"norm_mma: adapter shapes for x {tuple(x.shape)} must be {expected}, got {got}")
    if any(tensor.dtype != torch.promote_types(x.dtype, torch.float32) for tensor in (*adapter, mix)):
        raise ValueError(
            f"norm_mma: adapter parameters and mix must be fp32, got {[str(p.dtype) for p in (*adapter, mix)]}"
        )
    router_rows = tokens if row is None else mix.shape[0]
    if tuple(mix.shape) != (router_rows, 2) or (row is not None and tuple(row.shape) != (tokens,)):
        rows = None if row is None else tuple(row.shape)
        raise ValueError(f"norm_mma: for {tokens} tokens mix got {tuple(mix.shape)} and row {rows}")
    norm = (norm_weight,) if norm_bias is None else (norm_weight, norm_bias)
    if any(tuple(parameter.shape) != (channels,) for parameter in norm):
        raise ValueError(f"norm_mma: norm parameters must be ({channels},)")
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in norm):
        raise ValueError("norm_mma keeps the norm frozen, but a norm parameter requires a gradient")
