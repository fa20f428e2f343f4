"""SwiGLU: h = silu(gate) * up, with silu(g) = g * sigmoid(g) (GLU variants, arXiv 2002.05202).

    dup = dh * silu(gate)        dgate = dh * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

gate, up, h [T, F] fp16, bf16 or fp32, maths in fp32, rounded once. gate and up are two tensors or the halves of one,
[T, 2F], which are read where they lie. Only they are saved; torch's expression saves silu(gate) too.

    forward    reads gate, up, writes h                                     3 streams of T x F
    backward   reads dh, gate, up, writes dgate, dup                        5 streams; over gate and up: no memory

Elements are independent: tensors without gaps are one long row, so that every tile is full whatever F is.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activation import activate, extent, tile
from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, F] -> [T, F] in gate's dtype."""
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


@triton.jit
def swiglu_forward_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    h_ptr: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS]."""
    row, cols = tile(channels, ROWS, COLS)
    rows = row + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    gate = tl.load(gate_ptr + at * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at * up_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    silu, _ = activate(gate, "silu")
    tl.store(h_ptr + at * channels + cols[None, :], silu * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dh_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    dgate_ptr: tl.tensor,
    dup_ptr: tl.tensor,
    dh_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    dgate_stride: tl.tensor,
    dup_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS], read before it is written."""
    row, cols = tile(channels, ROWS, COLS)
    rows = row + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    dh = tl.load(dh_ptr + at * dh_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at * up_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    silu, slope = activate(gate, "silu")
    tl.store(dgate_ptr + at * dgate_stride + cols[None, :], dh * up * slope, mask=inside)
    tl.store(dup_ptr + at * dup_stride + cols[None, :], dh * silu, mask=inside)


def _forward_outputs(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@primitive("swiglu_forward(Tensor gate, Tensor up) -> Tensor", fake=_forward_outputs)
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, F] with unit last stride -> h [T, F]."""
    h = _forward_outputs(gate, up)
    tokens, channels = extent(gate, up)
    config = launch("swiglu_forward", channels, gate)
    grid = (triton.cdiv(tokens, config.rows) * triton.cdiv(channels, config.cols),)
    run(swiglu_forward_kernel, grid, config, gate, up, h, gate.stride(0), up.stride(0), tokens, channels)
    return h


@primitive(
    "swiglu_backward(Tensor dh, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()",
    fake=lambda dh, gate, up, dgate, dup: None,
)
def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """All [T, F] with unit last stride. Writes dgate and dup, which may be gate and up themselves."""
    tokens, channels = extent(dh, gate, up, dgate, dup)
    config = launch("swiglu_backward", channels, gate)
    strides = (x.stride(0) for x in (dh, gate, up, dgate, dup))
    grid = (triton.cdiv(tokens, config.rows) * triton.cdiv(channels, config.cols),)
    run(swiglu_backward_kernel, grid, config, dh, gate, up, dgate, dup, *strides, tokens, channels)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the left and the right half of x's channels."""
    middle = x.shape[1] // 2
    return x[:, :middle], x[:, middle:]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, reuse: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.reuse = reuse
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = (x.detach() if ctx.reuse else x.new_empty(x.shape) for x in (gate, up))
        swiglu_backward(unit_stride(dh), gate, up, dgate, dup)
        return dgate, dup, None


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, reuse: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.reuse = reuse
        return swiglu_forward(*_halves(gate_up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gradient = gate_up.detach() if ctx.reuse else gate_up.new_empty(gate_up.shape)
        swiglu_backward(unit_stride(dh), *_halves(gate_up), *_halves(gradient))
        return gradient, None


def swiglu(gate: Tensor, up: Tensor, *, reuse: bool = False) -> Tensor:
    """silu(gate) * up for gate, up [T, F] of one shape and dtype; returns [T, F] in that dtype.

    reuse: the backward writes the gradients over gate and up, and takes no memory. For two tensors that nobody else
    needs after this call, such as the results of two linears; a second backward is then an error of autograd.
    Raises ValueError where the two do not agree.
    """
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up [T, F] must agree in shape and dtype, got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}"
        )
    if choose("swiglu", gate, ("triton", "reference")) == "reference":
        return swiglu_reference(gate, up)
    return cast(Tensor, _SwiGLU.apply(unit_stride(gate), unit_stride(up), reuse))  # type: ignore[no-untyped-call]


def swiglu_packed(gate_up: Tensor, *, reuse: bool = False) -> Tensor:
    """`swiglu` of the halves of gate_up [T, 2F] = [gate | up], as one product writes them; returns [T, F].

    Raises ValueError for an odd number of channels.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"swiglu_packed takes [T, 2F], got {tuple(gate_up.shape)}")
    if choose("swiglu", gate_up, ("triton", "reference")) == "reference":
        return swiglu_reference(*_halves(gate_up))
    return cast(Tensor, _PackedSwiGLU.apply(unit_stride(gate_up), reuse))  # type: ignore[no-untyped-call]
