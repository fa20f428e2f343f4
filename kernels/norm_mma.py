"""Norm and MMA adapter in one op: y = n + scale * (m0 * e0 + m1 * e1), n = norm(x) (LaVIN, arXiv 2305.15023).

    u    = drop(n down_w^T + down_b)                                              the code, [T, h], h = 8 in LaVIN
    e_p  = [u[:, :h/2] up_p_w[:D/2]^T ; u[:, h/2:] up_p_w[D/2:]^T] + up_p_b       path p of 2, two groups of channels
    m    = mix[row]                                                               the router's weights, see router.py

norm is RMSNorm (norm_bias None) or LayerNorm with frozen affine parameters. x fp16, bf16 or fp32 [T, D]; adapter
parameters and mix fp32; sums in fp32. `add_norm_mma` does it to the stream x + delta, rounded to x's dtype, and returns
that too: the residual add of the branch before. The adapter is linear in n, so both paths are one product per group,
with v = [m0 u_g ; m1 u_g ; m0 ; m1] and W_g = [up_0 ; up_1 ; up0_b ; up1_b] over the group's channels: e = v_g W_g.

    pack       what the products want, once a call: weight * down_w and scale * W as rows of D in x's dtype [2h + 2, D],
               and fp32 [2, h]: down_b + down_w norm_bias, the sums of weight * down_w over the channels
    forward    u = rstd * (x - mean) (weight * down_w)^T + ...: one sweep over a row for the statistics and u together,
               and one back for y. Reads x (delta), writes y (stream), u [T, h], rstd (mean)               2 (4) streams
    backward   dv = scale * dy W^T; du = dv mixed and masked; dn = dy + du down_w. In the two sums over a row that the
               norm's own backward takes of dn, du's part is a product of codes, du (u - down_b - down_w norm_bias):
               so one sweep has dv and both sums, and one back has dx. Reads dy, x (dstream), writes dx, du [T, h] and
               each token's gradient of m [T, 2]                                                           3 (4) streams
    dadapter   gradients of the six adapter parameters from dy, x, u, du, in tiles of channels and chunks of tokens:
               fp32 partial sums, added in order; no atomics, so runs repeat bit for bit                   2 streams
    dmix       sums tokens' gradients of m over the tokens of each router row, in order

16 rows are swept at once. Of 16-bit rows one tile, of up to 512 channels (1024 forward without delta), stays in
registers between the sweeps; other tiles are read twice, the last first, which the L1 and L2 caches serve: at D = 4096
loads and stores are 1.33 (backward 1.53) times the least. What dadapter moves over the least is partial sums, which
weigh where tokens are few, and u, du and m for each tile of channels, from the L2 cache.

16-bit products have 16-bit operands: x and dy as they are, parameters rounded once, after the norm's weight multiplied
them, so that errors stay below those of the same expression in torch. Eager torch needs more than a dozen launches and
as many passes over [T, D].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide
from kernels.dropout import keep_mask, threshold
from kernels.launches import ANY
from kernels.layer_norm import layer_norm_reference
from kernels.norm_mma_kernels import norm_mma_backward_kernel, norm_mma_forward_kernel
from kernels.norm_mma_parameter_kernels import norm_mma_dadapter_kernel, norm_mma_dmix_kernel, norm_mma_pack_kernel
from kernels.rms_norm import rms_norm_reference
from kernels.router import Router, route, route_backward

# Programs of dadapter: two for each multiprocessor of an H200. More would only write more partial sums.
PROGRAMS = 256


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


def _shapes(x: Tensor, u: Tensor) -> dict[str, Any]:
    """Shapes that are compiled in."""
    h = u.shape[1]
    return {"CHANNELS": x.shape[1], "H": h, "G": max(4, triton.next_power_of_2(h // 2))}


def _size(x: Tensor) -> int:
    """By which the table of launches goes."""
    return ANY if x.dtype == torch.float32 else x.shape[1]


def _dropout(dropout: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Seed, threshold and scale of the kept values, as the kernels take them."""
    return (seed, threshold(dropout), 1.0 / (1.0 - dropout)) if dropout > 0.0 else (None, 0, 1.0)


def _pack_outputs(
    dtype: torch.dtype, norm_weight: Tensor, norm_bias: Tensor | None, adapter: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    h, channels = adapter[0].shape
    return norm_weight.new_empty(2 * h + 2, channels, dtype=dtype), adapter[0].new_empty(2, h)


@primitive(
    "norm_mma_pack(ScalarType dtype, Tensor norm_weight, Tensor? norm_bias, Tensor[] adapter, float scale) "
    "-> (Tensor, Tensor)",
    fake=_pack_outputs,
)
def norm_mma_pack(
    dtype: torch.dtype, norm_weight: Tensor, norm_bias: Tensor | None, adapter: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """-> packed [2h + 2, D] of `dtype`: weight * down_w, then scale * up0_w, up1_w (transposed), up0_b and up1_b;
    affine fp32 [2, h]: down_b + down_w norm_bias, and the sums of packed's first h rows."""
    packed, affine = _pack_outputs(dtype, norm_weight, norm_bias, adapter, scale)
    h, channels = adapter[0].shape
    run(
        norm_mma_pack_kernel, (packed.shape[0],), launch("norm_mma_pack", channels, norm_weight),
        norm_weight, norm_bias, *adapter, packed, affine, scale, CHANNELS=channels, H=h,
    )  # fmt: skip
    return packed, affine


def _forward_outputs(
    x: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    affine: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    stream = x.new_empty((0, 0) if delta is None else x.shape)
    mean, rstd = affine.new_empty(0 if norm_bias is None else tokens), affine.new_empty(tokens)
    return stream, x.new_empty(x.shape), mean, rstd, affine.new_empty(tokens, affine.shape[1])


@primitive(
    "norm_mma_forward(Tensor x, Tensor? delta, Tensor norm_weight, Tensor? norm_bias, float eps, Tensor packed, "
    "Tensor affine, Tensor mix, Tensor? row, float dropout, Tensor? seed, int site, bool as_sum=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_outputs,
)
def norm_mma_forward(
    x: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    affine: Tensor,
    mix: Tensor,
    row: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    site: int,
    as_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, delta with unit last stride, all else contiguous, packed and affine of `norm_mma_pack`; as_sum: as if x were
    the sum of two.

    -> stream [T, D] (without delta [0, 0]), y [T, D], mean [T] (RMSNorm: [0]), rstd [T], u [T, h] fp32.
    """
    stream, y, mean, rstd, u = _forward_outputs(x, delta, norm_weight, norm_bias, eps, packed, affine)
    tokens, channels = x.shape
    config = launch("norm_mma_forward", _size(x), x)
    if delta is None and not as_sum and channels > config.cols:
        config = replace(config, cols=2 * config.cols)  # as many bytes under way as with delta
    seed, limit, kept_scale = _dropout(dropout, seed)
    run(
        norm_mma_forward_kernel, (triton.cdiv(tokens, config.rows),), config,
        x, delta, norm_weight, norm_bias, packed, affine, mix, row, seed, stream, y, mean, rstd, u,
        x.stride(0), 0 if delta is None else delta.stride(0), tokens, triton.cdiv(channels, config.cols), eps,
        site, limit, kept_scale, BANDS=config.warps, **_shapes(x, u),
    )  # fmt: skip
    return stream, y, mean, rstd, u


def _backward_outputs(
    dy: Tensor, dstream: Tensor | None, x: Tensor, norm_weight: Tensor, packed: Tensor, affine: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, h = x.shape[0], affine.shape[1]
    return x.new_empty(x.shape), affine.new_empty(tokens, h), affine.new_empty(tokens, 2)


@primitive(
    "norm_mma_backward(Tensor dy, Tensor? dstream, Tensor x, Tensor norm_weight, Tensor packed, Tensor affine, "
    "Tensor mix, Tensor? row, float dropout, Tensor? seed, int site, Tensor mean, Tensor rstd, Tensor u, "
    "bool layer_norm) -> (Tensor, Tensor, Tensor)",
    fake=_backward_outputs,
)
def norm_mma_backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    norm_weight: Tensor,
    packed: Tensor,
    affine: Tensor,
    mix: Tensor,
    row: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    site: int,
    mean: Tensor,
    rstd: Tensor,
    u: Tensor,
    layer_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dstream, x (the stream) with unit last stride -> dx [T, D], du [T, h] fp32, dm [T, 2] fp32."""
    dx, du, dm = _backward_outputs(dy, dstream, x, norm_weight, packed, affine)
    tokens, channels = x.shape
    config = launch("norm_mma_backward", _size(x), x)
    seed, limit, kept_scale = _dropout(dropout, seed)
    run(
        norm_mma_backward_kernel, (triton.cdiv(tokens, config.rows),), config,
        dy, dstream, x, norm_weight, packed, affine, mix, row, seed, mean, rstd, u, dx, du, dm,
        dy.stride(0), 0 if dstream is None else dstream.stride(0), x.stride(0),
        tokens, triton.cdiv(channels, config.cols), site, limit, kept_scale,
        LAYER_NORM=layer_norm, BANDS=config.warps, **_shapes(x, u),
    )  # fmt: skip
    return dx, du, dm


def _dadapter_outputs(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    mix: Tensor,
    row: Tensor | None,
    scale: float,
    mean: Tensor,
    rstd: Tensor,
    u: Tensor,
    du: Tensor,
) -> Tensor:
    channels, h = x.shape[1], u.shape[1]
    return u.new_empty(2 * channels * h + h + 2 * channels)


@primitive(
    "norm_mma_dadapter(Tensor dy, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor mix, Tensor? row, "
    "float scale, Tensor mean, Tensor rstd, Tensor u, Tensor du) -> Tensor",
    fake=_dadapter_outputs,
)
def norm_mma_dadapter(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    mix: Tensor,
    row: Tensor | None,
    scale: float,
    mean: Tensor,
    rstd: Tensor,
    u: Tensor,
    du: Tensor,
) -> Tensor:
    """-> gradients of the adapter's parameters, flattened, in their order; fp32."""
    gradient = _dadapter_outputs(dy, x, norm_weight, norm_bias, mix, row, scale, mean, rstd, u, du)
    tokens, channels = x.shape
    config = launch("norm_mma_dadapter", _size(x), x)
    tiles = 2 * triton.cdiv(channels // 2, config.cols)
    chunks = max(1, min(triton.cdiv(tokens, config.chunk), PROGRAMS // tiles))
    chunk = max(1, triton.cdiv(tokens, chunks * config.rows)) * config.rows
    partial = u.new_empty(triton.cdiv(tokens, chunk), gradient.numel())
    run(
        norm_mma_dadapter_kernel, (tiles, partial.shape[0]), config,
        dy, x, norm_weight, norm_bias, mix, row, mean, rstd, u, du, partial,
        dy.stride(0), x.stride(0), tokens, chunk, scale, **_shapes(x, u),
    )  # fmt: skip
    return torch.sum(partial, 0, out=gradient)


def _dmix_outputs(dm: Tensor, row: Tensor, router_rows: int) -> Tensor:
    return dm.new_empty(router_rows, 2)


@primitive("norm_mma_dmix(Tensor dm, Tensor row, int router_rows) -> Tensor", fake=_dmix_outputs)
def norm_mma_dmix(dm: Tensor, row: Tensor, router_rows: int) -> Tensor:
    """dm [T, 2], row [T] -> [R, 2]: the sum over the tokens of each router row."""
    dmix = _dmix_outputs(dm, row, router_rows)
    config = launch("norm_mma_dmix", router_rows, dm)
    run(norm_mma_dmix_kernel, (router_rows,), config, dm, row, dmix, dm.shape[0])
    return dmix


class _NormMMA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        mix: Tensor | None,
        router_w: Tensor | None,
        router_b: Tensor | None,
        temperature: float,
        router_rows: Tensor | None,
        row: Tensor | None,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        site: int,
        as_sum: bool,
        *adapter: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if mix is None:
            assert router_w is not None and router_b is not None and router_rows is not None
            router = Router(router_w, router_b, temperature, router_rows)
            mix = route(_rows(x, delta, router), norm_weight, norm_bias, eps, router)
        packed, affine = norm_mma_pack(x.dtype, norm_weight, norm_bias, list(adapter), scale)
        stream, y, *statistics = norm_mma_forward(
            x, delta, norm_weight, norm_bias, eps, packed, affine, mix, row, dropout, seed, site, as_sum
        )  # fmt: skip
        stream = x if delta is None else stream
        routing = router_w, router_b, router_rows
        ctx.save_for_backward(stream, norm_weight, norm_bias, packed, affine, mix, *routing, row, seed, *statistics)
        ctx.options = eps, temperature, scale, dropout, site, [parameter.shape for parameter in adapter]
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, packed, affine, mix, router_w, router_b, router_rows, *rest = ctx.saved_tensors
        row, seed, mean, rstd, u = rest
        eps, temperature, scale, dropout, site, shapes = ctx.options
        dx, dmix, drouter_w, drouter_b = dstream, None, None, None
        dadapter: list[Tensor | None] = [None] * len(shapes)
        if dy is not None:
            dy = unit_stride(dy)
            dx, du, dm = norm_mma_backward(
                dy, None if dstream is None else unit_stride(dstream), x, norm_weight, packed, affine, mix, row,
                dropout, seed, site, mean, rstd, u, norm_bias is not None,
            )  # fmt: skip
            if router_rows is None and ctx.needs_input_grad[5]:
                dmix = dm if row is None else norm_mma_dmix(dm, row, mix.shape[0])
            if router_rows is not None:
                router = Router(router_w, router_b, temperature, router_rows)
                at_rows = x.index_select(0, router_rows)
                drows, drouter_w, drouter_b = route_backward(
                    norm_mma_dmix(dm, row, mix.shape[0]), mix, at_rows, norm_weight, norm_bias, eps, router
                )  # fmt: skip
                dx.index_add_(0, router_rows, drows)
            if any(ctx.needs_input_grad[16:]):
                flat = norm_mma_dadapter(dy, x, norm_weight, norm_bias, mix, row, scale, mean, rstd, u, du)
                parts = torch.split(flat, [shape.numel() for shape in shapes])
                dadapter = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        ddelta = dx if ctx.needs_input_grad[1] else None
        return dx, ddelta, None, None, None, dmix, drouter_w, drouter_b, *8 * [None], *dadapter


def _rows(x: Tensor, delta: Tensor | None, router: Router) -> Tensor:
    """The stream at the router's rows, [R, D], rounded to x's dtype."""
    rows = x.index_select(0, router.rows)
    return rows if delta is None else rows + delta.index_select(0, router.rows)


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
    return add_norm_mma(
        x, None, norm_weight, norm_bias, eps, down_w, down_b, up0_w, up0_b, up1_w, up1_b, mix, row,
        scale=scale, dropout=dropout, seed=seed, site=site,
    )[1]  # fmt: skip


def add_norm_mma(
    x: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    down_w: Tensor,
    down_b: Tensor,
    up0_w: Tensor,
    up0_b: Tensor,
    up1_w: Tensor,
    up1_b: Tensor,
    mix: Tensor | Router,
    row: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    as_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta, rounded to x's dtype (x itself where delta is None), and `norm_mma` of it.

    delta [T, D] of x's dtype, with a gradient, all else as in `norm_mma`. Backward both gradients are one kernel's:
    dx = ddelta = dstream + that of the norm and the adapter; an absent one is not read. A `Router` (kernels/router.py)
    computes mix from its rows of the stream, and has gradients in its place.
    as_sum: without a delta too, take the tiles of a call that has one: of the stream that it returned the result is the
    same bits, at some cost in speed.
    """
    adapter = (down_w, down_b, up0_w, up0_b, up1_w, up1_b)
    router = mix if isinstance(mix, Router) else None
    _check(x, delta, norm_weight, norm_bias, adapter, mix, row, dropout)
    if choose("norm_mma", x, ("triton", "reference")) == "reference":
        stream = x if delta is None else (wide(x) + wide(delta)).to(x.dtype)
        if isinstance(mix, Router):
            mix = route(_rows(x, delta, mix), norm_weight, norm_bias, eps, mix)
        return stream, norm_mma_reference(
            stream, norm_weight, norm_bias, eps, list(adapter), mix, row, scale, dropout, seed, site
        )  # fmt: skip
    both = _NormMMA.apply(  # type: ignore[no-untyped-call]
        unit_stride(x), None if delta is None else unit_stride(delta),
        norm_weight.contiguous(), None if norm_bias is None else norm_bias.contiguous(), eps,
        mix.contiguous() if isinstance(mix, Tensor) else None,
        *((router.weight, router.bias, router.temperature, router.rows) if router else (None, None, 1.0, None)),
        None if row is None else row.contiguous(), scale,
        0.0 if seed is None else dropout, seed if dropout > 0.0 else None, site, as_sum,
        *(parameter.contiguous() for parameter in adapter),
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor], both)


def _check(
    x: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    adapter: tuple[Tensor, ...],
    mix: Tensor | Router,
    row: Tensor | None,
    dropout: float,
) -> None:
    threshold(dropout)  # its range
    tokens, channels = x.shape
    h = adapter[0].shape[0]
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        got = f"{tuple(delta.shape)} {delta.dtype}"
        raise ValueError(f"norm_mma: delta must be as x, {tuple(x.shape)} {x.dtype}, got {got}")
    if channels % 2 or h % 2:
        raise ValueError(f"norm_mma needs an even width and an even code, got D {channels}, h {h}")
    up = ((channels, h // 2), (channels,))
    expected = ((h, channels), (h,), *up, *up)
    shapes = tuple(tuple(parameter.shape) for parameter in adapter)
    if shapes != expected:
        raise ValueError(f"norm_mma: adapter shapes for x {tuple(x.shape)} must be {expected}, got {shapes}")
    trained = (*adapter, mix) if isinstance(mix, Tensor) else (*adapter, mix.weight, mix.bias)
    if any(tensor.dtype != torch.promote_types(x.dtype, torch.float32) for tensor in trained):
        raise ValueError(f"norm_mma: adapter parameters and mix must be fp32, got {[str(p.dtype) for p in trained]}")
    mixed = tuple(mix.shape) if isinstance(mix, Tensor) else (mix.rows.shape[0], *mix.weight.shape[:1])
    router_rows = tokens if row is None else mixed[0]
    if mixed != (router_rows, 2) or (row is not None and tuple(row.shape) != (tokens,)):
        rows = None if row is None else tuple(row.shape)
        raise ValueError(f"norm_mma: for {tokens} tokens mix got {mixed} and row {rows}")
    if isinstance(mix, Router) and (mix.weight.shape != (2, channels) or mix.bias.shape != (2,) or row is None):
        raise ValueError(
            f"norm_mma: a router takes weight (2, {channels}), bias (2,) and each token's row, got "
            f"{tuple(mix.weight.shape)}, {tuple(mix.bias.shape)} and {'no row' if row is None else 'rows'}"
        )
    norm = (norm_weight,) if norm_bias is None else (norm_weight, norm_bias)
    if any(tuple(parameter.shape) != (channels,) for parameter in norm):
        raise ValueError(f"norm_mma: norm parameters must be ({channels},)")
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in norm):
        raise ValueError("norm_mma keeps the norm frozen, but a norm parameter requires a gradient")
