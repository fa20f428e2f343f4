"""What rms_norm.py and layer_norm.py run on a GPU: both norms, with the residual add before them, forward and backward.

    stream = x + delta                          rounded to x's dtype; x itself where there is no delta
    xhat   = (stream - mean) * rstd             rstd = 1 / sqrt(mean((stream - mean)^2) + eps); RMSNorm: mean = 0
    y      = xhat * weight + bias               RMSNorm: no bias

    g      = (dy + dy2) * weight
    dx     = dstream + rstd * (g - xhat * mean(g * xhat) - mean(g))             RMSNorm: without mean(g)
    dweight, dbias = sum over tokens of (dy + dy2) * xhat, of dy + dy2

x, delta, stream, y [T, D] fp16, bf16 or fp32; weight, bias [D] 16 or 32 bits; all between is fp32. Means are over a
row, and the variance is that of the centred row: mean(x^2) - mean^2 would cancel. dx is delta's gradient too. dy and
dy2 are the gradients of y where two branches read it, dstream that of the stream: what is absent is not read.

    forward    reads x (and delta), writes y (and stream) and the statistics            2 streams of T x D; 4 with delta
    backward   reads dy, stream (and dy2, dstream), writes dx                           3 to 5 streams
    daffine    reads dy, stream (and dy2), writes fp32 sums over fixed chunks of tokens, which are then added in order:
               runs repeat bit for bit. Only for trained affine parameters: a frozen norm is one kernel backward.

Saved for the backward: the stream and, for each token, rstd (LayerNorm: and mean) in fp32. Forward and backward touch
every byte once; daffine also writes and reads its partial sums, and the statistics once for each block of channels.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import norm_kernels
from kernels.dispatch import launch, primitive, run, unit_stride


def _stride(x: Tensor | None) -> int:
    """Of rows, in elements."""
    return 0 if x is None else x.stride(0)


def _row_size(x: Tensor) -> int:
    """Channels of a row for the launch table, where those of fp32 count twice: they take twice the registers."""
    return x.shape[1] * x.element_size() // 2


def _forward_outputs(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0 if delta is None else x.shape)
    return stream, x.new_empty(x.shape), x.new_empty(x.shape[0], 1 if bias is None else 2, dtype=torch.float32)


@primitive(
    "norm_forward(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, float eps, bool cast_before_weight) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_forward_outputs,
)
def norm_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, cast_before_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta [T, D] with unit last stride, weight, bias [D] contiguous; no bias: RMSNorm.

    Returns stream [T, D] (empty where there is no delta: it is x), y [T, D], statistics fp32 [T, 1]: rstd, or [T, 2]:
    rstd and mean.
    """
    stream, y, statistics = _forward_outputs(x, delta, weight, bias, eps, cast_before_weight)
    tokens, channels = x.shape
    config = launch("norm_forward", _row_size(x), x)
    run(
        norm_kernels.norm_forward_kernel, (triton.cdiv(tokens, config.rows),), config,
        x, delta, weight, bias, stream, y, statistics, x.stride(0), _stride(delta), tokens, eps,
        CHANNELS=channels, ALIGN=math.gcd(16, channels, x.stride(0), _stride(delta)), CAST_FIRST=cast_before_weight,
    )  # fmt: skip
    return stream, y, statistics


def _backward_outputs(
    dy: Tensor, dy2: Tensor | None, dstream: Tensor | None, stream: Tensor, weight: Tensor, statistics: Tensor
) -> Tensor:
    return stream.new_empty(stream.shape)


@primitive(
    "norm_backward(Tensor dy, Tensor? dy2, Tensor? dstream, Tensor stream, Tensor weight, Tensor statistics) -> Tensor",
    fake=_backward_outputs,
)
def norm_backward(
    dy: Tensor, dy2: Tensor | None, dstream: Tensor | None, stream: Tensor, weight: Tensor, statistics: Tensor
) -> Tensor:
    """Gradients and stream [T, D] with unit last stride, statistics of the forward -> dx [T, D]."""
    dx = _backward_outputs(dy, dy2, dstream, stream, weight, statistics)
    tokens, channels = stream.shape
    config = launch("norm_backward", _row_size(stream), stream)
    strides = (dy.stride(0), _stride(dy2), _stride(dstream), stream.stride(0))
    run(
        norm_kernels.norm_backward_kernel, (triton.cdiv(tokens, config.rows),), config,
        dy, dy2, dstream, stream, weight, statistics, dx, *strides, tokens,
        CHANNELS=channels, ALIGN=math.gcd(16, channels, *strides), LAYER_NORM=statistics.shape[1] == 2,
    )  # fmt: skip
    return dx


def _daffine_outputs(
    dy: Tensor, dy2: Tensor | None, stream: Tensor, statistics: Tensor, cast_before_weight: bool
) -> Tensor:
    return stream.new_empty(statistics.shape[1], stream.shape[1], dtype=torch.float32)


@primitive(
    "norm_daffine(Tensor dy, Tensor? dy2, Tensor stream, Tensor statistics, bool cast_before_weight) -> Tensor",
    fake=_daffine_outputs,
)
def norm_daffine(
    dy: Tensor, dy2: Tensor | None, stream: Tensor, statistics: Tensor, cast_before_weight: bool
) -> Tensor:
    """As in `norm_backward` -> dweight, or dweight and dbias: fp32 [1 or 2, D]."""
    tokens, channels = stream.shape
    config = launch("norm_daffine", channels, stream)
    chunks = triton.cdiv(tokens, config.chunk)
    partial = stream.new_empty(chunks, statistics.shape[1], channels, dtype=torch.float32)
    run(
        norm_kernels.norm_daffine_kernel, (triton.cdiv(channels, config.cols), chunks), config,
        dy, dy2, stream, statistics, partial, dy.stride(0), _stride(dy2), stream.stride(0), tokens, channels,
        LAYER_NORM=statistics.shape[1] == 2, CAST_FIRST=cast_before_weight,
    )  # fmt: skip
    return partial.sum(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        cast_before_weight: bool,
        branches: int,
    ) -> tuple[Tensor, ...]:
        stream, y, statistics = norm_forward(x, delta, weight, bias, eps, cast_before_weight)
        if delta is None:
            stream = x
        ctx.save_for_backward(stream, weight, statistics)
        ctx.cast_before_weight = cast_before_weight
        ctx.set_materialize_grads(False)
        return stream, y, *(y.view_as(y) for _ in range(branches - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, statistics = ctx.saved_tensors
        dx, dweight, dbias = dstream, None, None
        present = [unit_stride(dy) for dy in dys if dy is not None]
        if present:
            dy, dy2 = present[0], present[1] if len(present) == 2 else None
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                dstream = None if dstream is None else unit_stride(dstream)
                dx = norm_backward(dy, dy2, dstream, stream, weight, statistics)
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                dweight, dbias = (*norm_daffine(dy, dy2, stream, statistics, ctx.cast_before_weight), None)[:2]
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, dbias, None, None, None


def check_delta(op: str, x: Tensor, delta: Tensor | None) -> None:
    """Raises ValueError where x + delta would have another shape or dtype than x."""
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(
            f"{op}: x {tuple(x.shape)} {x.dtype} wants a delta of that shape and dtype, "
            f"got {tuple(delta.shape)} {delta.dtype}"
        )


def norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    cast_before_weight: bool = False,
    branches: int = 1,
) -> tuple[Tensor, ...]:
    """(stream, y) or, for two branches, (stream, y, y); formulas and shapes at the top. No bias means RMSNorm.

    The gradients of all outputs arrive in one backward, whose one kernel adds them. Arguments are not checked.
    """
    x, weight = unit_stride(x), weight.contiguous()
    delta = None if delta is None else unit_stride(delta)
    bias = None if bias is None else bias.contiguous()
    return cast(tuple[Tensor, ...], _Norm.apply(x, delta, weight, bias, eps, cast_before_weight, branches))  # type: ignore[no-untyped-call]
