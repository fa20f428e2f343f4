"""RMSNorm: y = cast(x * rstd) * weight, rstd = 1 / sqrt(mean(x^2) + eps) (arXiv 1910.07467; LLaMA's order of casts).

x [T, D] fp16, bf16 or fp32, weight [D]; statistics in fp32. x * rstd is rounded to x's dtype before the weight
multiplies it, as LLaMA does, so that 16-bit results are those of the models we load.

    forward    reads x, writes y and rstd [T] fp32                           2 streams of T x D
    backward   dx = rstd * (g - xhat * mean(g * xhat)),  g = dy * weight     3 streams (dy, x in, dx out)
    dweight    sum over tokens of dy * cast(x * rstd), fp32, in partial sums over fixed chunks of tokens: repeatable.
               Skipped where the weight is frozen, which is the usual case: that, and one pass for dx, is why this
               kernel exists.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D] in x's dtype."""
    x32 = wide(x)
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (wide(normed) * wide(weight)).to(x.dtype)


@triton.jit
def rms_norm_forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: whole rows, a tile [ROWS, COLS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    x_raw = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0)
    x = x_raw.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / channels + eps)
    normed = (x * rstd[:, None]).to(x_raw.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * channels + cols[None, :], normed * weight[None, :], mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < tokens)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: whole rows, a tile [ROWS, COLS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=rows < tokens, other=0.0)[:, None]
    xhat = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32) * rstd
    dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
    dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1) / channels)[:, None])
    tl.store(dx_ptr + at * channels + cols[None, :], dx, mask=inside)


@triton.jit
def rms_norm_dweight_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: COLS channels summed over CHUNK tokens, into partial [chunks, D]."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = tl.program_id(1) * CHUNK + start + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
        at = rows.to(tl.int64)[:, None]
        x_raw = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < tokens, other=0.0)
        normed = (x_raw.to(tl.float32) * rstd[:, None]).to(x_raw.dtype).to(tl.float32)
        dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(dy * normed, axis=0)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * channels + cols, total, mask=cols < channels)


def _forward_outputs(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@primitive("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", fake=_forward_outputs)
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] with unit last stride, weight [D] contiguous -> y [T, D], rstd [T] fp32."""
    y, rstd = _forward_outputs(x, weight, eps)
    tokens, channels = x.shape
    config = launch("rms_norm_forward", channels, x)
    grid = (triton.cdiv(tokens, config.rows),)
    run(rms_norm_forward_kernel, grid, config, x, weight, y, rstd, x.stride(0), tokens, channels, eps)
    return y, rstd


def _backward_outputs(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@primitive("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor", fake=_backward_outputs)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dy, x [T, D] with unit last stride, rstd of the forward -> dx [T, D]."""
    dx = _backward_outputs(dy, x, weight, rstd)
    tokens, channels = x.shape
    config = launch("rms_norm_backward", channels, x)
    run(
        rms_norm_backward_kernel, (triton.cdiv(tokens, config.rows),), config,
        dy, x, weight, rstd, dx, dy.stride(0), x.stride(0), tokens, channels,
    )  # fmt: skip
    return dx


def _dweight_outputs(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


@primitive("rms_norm_dweight(Tensor dy, Tensor x, Tensor rstd) -> Tensor", fake=_dweight_outputs)
def rms_norm_dweight(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dy, x [T, D] with unit last stride, rstd of the forward -> dweight [D] fp32."""
    tokens, channels = x.shape
    config = launch("rms_norm_dweight", channels, x)
    chunks = triton.cdiv(tokens, config.chunk)
    partial = x.new_empty(chunks, channels, dtype=torch.float32)
    run(
        rms_norm_dweight_kernel, (triton.cdiv(channels, config.cols), chunks), config,
        dy, x, rstd, partial, dy.stride(0), x.stride(0), tokens, channels,
    )  # fmt: skip
    return partial.sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        dy = unit_stride(dy)
        dx = rms_norm_backward(dy, x, weight, rstd) if ctx.needs_input_grad[0] else None
        dweight = rms_norm_dweight(dy, x, rstd) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the rows of x [T, D] to unit mean square and multiply by weight [D]; returns [T, D] in x's dtype.

    Gradients for x and, where it requires one, weight (summed in fp32, in a fixed order).
    Raises ValueError where the shapes do not fit.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"rms_norm takes x [T, D] and weight [D], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if choose("rms_norm", x, ("triton", "reference")) == "reference":
        return rms_norm_reference(x, weight, eps)
    y = _RMSNorm.apply(unit_stride(x), weight.contiguous(), eps)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)
