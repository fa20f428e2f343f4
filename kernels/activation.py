"""Bias and activation between the two products of an MLP: a = act(z + bias), the bias optional, frozen or trained.

act: gelu with erf (LLaVA, Bunny), gelu_tanh (SigLIP, Phi), quick_gelu = x sigmoid(1.702 x) (CLIP), silu (LaVIN).
z, a [T, H] fp16, bf16 or fp32, bias [H] of any of them; maths in fp32, rounded once. Only z is kept for the backward:
torch's expressions keep z + bias and, for quick_gelu, two more.

    forward    reads z, writes a                                                        2 streams of T x H
    backward   dz = da act'(z + bias): reads da, z, writes dz, which may be z or da     3 streams
               a too, where the next product's weight is trained and a was not kept     1 more
               dbias = sum of dz, in fp32 partial sums over fixed chunks of tokens, added in order: repeatable.
               They are written and read again, 1 byte for 64 moved, for 32 up to 4,096 tokens; none where the bias
               is frozen

Each act is z gate(z). The gate is the sigmoid of z (silu), 1.702 z (quick_gelu) or 2 sqrt(2/pi) (z + 0.044715 z^3)
(gelu_tanh). For gelu it is the normal distribution Phi(z): Phi(-|z|) = exp(P(|z|)), P the polynomial of degree 8 that
brings it nearest to erfc in absolute value (1e-8, a sixth of what fp32 torch loses in 1 + erf) and falls to -inf
beyond. It takes one exponential and no division.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide
from kernels.launches import ANY

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]


def activation_reference(z: Tensor, activation: str) -> Tensor:
    """act(z), any shape."""
    if activation == "silu":
        return F.silu(z)
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def bias_act_reference(z: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """z [T, H], bias [H] -> [T, H] in z's dtype."""
    z32 = wide(z) if bias is None else wide(z) + wide(bias)
    return activation_reference(z32, activation).to(z.dtype)


@triton.jit
def sigmoid(z: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """sigmoid(z) and its derivative, without the cancellation of 1 - sigmoid(z)."""
    e = tl.exp(-1.0 * tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * inverse, inverse), e * inverse * inverse


@triton.jit
def activate(z: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """act(z) and act'(z) of an fp32 block."""
    if ACT == "gelu":
        u = tl.abs(z)
        high = -0.00010110939 + u * (-0.0001265324 + u * (2.6769873e-05 + u * -1.9214391e-06))
        low = -0.31829659 + u * (-0.036393713 + u * (0.0049043432 + u * high))
        tail = tl.exp(-0.69314717 + u * (-0.79788569 + u * low))  # Phi(-|z|)
        gate = tl.where(z < 0, tail, 1.0 - tail)
        slope = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        gate, slope = sigmoid(z * (1.5957691216057308 + 0.07135481282607101 * z * z))
        slope *= 1.5957691216057308 + 3.0 * 0.07135481282607101 * z * z
    elif ACT == "quick_gelu":
        gate, slope = sigmoid(1.702 * z)
        slope *= 1.702
    else:
        gate, slope = sigmoid(z)
    return z * gate, gate + z * slope


@triton.jit
def tile(channels: tl.tensor, HEIGHT: tl.constexpr, COLS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First row and channels [COLS] of this program, which has HEIGHT rows; programs go along the channels first."""
    across = tl.cdiv(channels, COLS)
    row = tl.program_id(0) // across * HEIGHT
    return row, tl.program_id(0) % across * COLS + tl.arange(0, COLS)


def extent(*tensors: Tensor) -> tuple[int, int]:
    """Rows and channels [T, D] that the kernels see: one row of T x D where no tensor has gaps."""
    tokens, channels = tensors[0].shape
    if tokens * channels <= ANY and all(x.is_contiguous() for x in tensors):
        return 1, tokens * channels
    return tokens, channels


@triton.jit
def bias_act_forward_kernel(
    z_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    a_ptr: tl.tensor,
    z_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS]."""
    row, cols = tile(channels, ROWS, COLS)
    rows = row + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    z = tl.load(z_ptr + at * z_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
    a, _ = activate(z, ACT)
    tl.store(a_ptr + at * channels + cols[None, :], a, mask=inside)


@triton.jit
def bias_act_backward_kernel(
    da_ptr: tl.tensor,
    z_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    dz_ptr: tl.tensor,
    a_ptr: tl.tensor | None,
    partial_ptr: tl.tensor | None,
    da_stride: tl.tensor,
    z_stride: tl.tensor,
    dz_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: COLS channels of CHUNK tokens; their sum of dz goes into partial [chunks, H]."""
    row, cols = tile(channels, CHUNK, COLS)
    bias = tl.zeros([COLS], dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = row + start + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
        at = rows.to(tl.int64)[:, None]
        z = tl.load(z_ptr + at * z_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + at * da_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        a, slope = activate(z + bias[None, :], ACT)
        dz = da * slope
        tl.store(dz_ptr + at * dz_stride + cols[None, :], dz, mask=inside)
        if a_ptr is not None:
            tl.store(a_ptr + at * channels + cols[None, :], a, mask=inside)
        total += dz
    if partial_ptr is not None:
        chunk = (row // CHUNK).to(tl.int64)
        tl.store(partial_ptr + chunk * channels + cols, tl.sum(total, axis=0), mask=cols < channels)


def _forward_outputs(z: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return z.new_empty(z.shape)


@primitive("bias_act_forward(Tensor z, Tensor? bias, str activation) -> Tensor", fake=_forward_outputs)
def bias_act_forward(z: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """z [T, H] with unit last stride, bias [H] contiguous -> act(z + bias) [T, H]."""
    a = _forward_outputs(z, bias, activation)
    tokens, channels = z.shape
    config = launch("bias_act_forward", channels, z)
    grid = (triton.cdiv(tokens, config.rows) * triton.cdiv(channels, config.cols),)
    run(bias_act_forward_kernel, grid, config, z, bias, a, z.stride(0), tokens, channels, ACT=activation)
    return a


def _backward_outputs(
    da: Tensor, z: Tensor, bias: Tensor | None, dz: Tensor, a: Tensor | None, activation: str, with_dbias: bool
) -> Tensor:
    return z.new_empty(z.shape[1] if with_dbias else 0, dtype=torch.float32)


@primitive(
    "bias_act_backward(Tensor da, Tensor z, Tensor? bias, Tensor(a!) dz, Tensor(b!)? a, str activation, "
    "bool with_dbias) -> Tensor",
    fake=_backward_outputs,
)
def bias_act_backward(
    da: Tensor, z: Tensor, bias: Tensor | None, dz: Tensor, a: Tensor | None, activation: str, with_dbias: bool
) -> Tensor:
    """Writes dz and, unless it is None, a, and returns dbias [H] fp32 (empty without `with_dbias`).

    da, z, dz [T, H] with unit last stride, where dz may be da or z itself; bias [H] and a [T, H] contiguous.
    """
    tokens, channels = z.shape
    config = launch("bias_act_backward", tokens, z)
    if not with_dbias:
        config = replace(config, chunk=config.rows)
    chunks = triton.cdiv(tokens, config.chunk)
    partial = z.new_empty(chunks, channels, dtype=torch.float32) if with_dbias else None
    run(
        bias_act_backward_kernel, (chunks * triton.cdiv(channels, config.cols),), config,
        da, z, bias, dz, a, partial, da.stride(0), z.stride(0), dz.stride(0), tokens, channels, ACT=activation,
    )  # fmt: skip
    return z.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


class _BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, activation: str, reuse: bool) -> Tensor:
        ctx.save_for_backward(z, bias)
        ctx.activation, ctx.reuse = activation, reuse
        return bias_act_forward(z, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        z, bias = ctx.saved_tensors
        dz = z.detach() if ctx.reuse else z.new_empty(z.shape)
        with_dbias = ctx.needs_input_grad[1]
        dbias = bias_act_backward(unit_stride(da), z, bias, dz, None, ctx.activation, with_dbias)
        return dz, dbias if with_dbias else None, None, None


def check_activation(activation: str) -> None:
    """Raises ValueError for a name that is no `Activation`."""
    if activation not in get_args(Activation):
        raise ValueError(f"activation got {activation!r}; accepted: {', '.join(get_args(Activation))}")


def bias_act(z: Tensor, bias: Tensor | None, activation: Activation, *, reuse: bool = False) -> Tensor:
    """act(z + bias) of z [T, H], bias [H] or None; returns [T, H] in z's dtype.

    Gradients for z and, where it requires one, bias (summed in fp32, in a fixed order).
    reuse: the backward writes z's gradient over z, and takes no memory. For a z that nobody else needs after this call,
    such as the result of a linear; a second backward is then an error of autograd.
    Raises ValueError for an unknown activation or where the shapes do not fit.
    """
    check_activation(activation)
    if z.ndim != 2 or (bias is not None and bias.shape != z.shape[1:]):
        got = "None" if bias is None else str(tuple(bias.shape))
        raise ValueError(f"bias_act takes z [T, H] and bias [H] or None, got {tuple(z.shape)} and {got}")
    if choose("bias_act", z, ("triton", "reference")) == "reference":
        return bias_act_reference(z, bias, activation)
    if bias is not None:
        bias = bias.contiguous()
    return cast(Tensor, _BiasAct.apply(unit_stride(z), bias, activation, reuse))  # type: ignore[no-untyped-call]
