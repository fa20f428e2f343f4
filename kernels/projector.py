"""The projector between tower and language model: y = act(x w1^T + b1) w2^T + b2, every parameter trained.

act: silu (LaVIN), gelu with erf (LLaVA, Bunny), gelu_tanh (SigLIP), quick_gelu = x sigmoid(1.702 x) (CLIP).
x [N, K] fp16, bf16 or fp32; parameters fp32 or 16 bits, cast to x's dtype for the products; y [N, D] in x's dtype.

The products are cuBLAS; the kernels here join what lies between them. Only x and z = x w1^T are kept for the backward:
act is computed again, which halves what eager torch saves.

    forward    a = act(z + b1)                                reads z, writes a                   2 streams of N x H
    backward   dz = da * act'(z + b1), a again, db1 = sum dz  reads da, z, writes dz, a           4 streams
               db1 in fp32 partial sums over fixed chunks of tokens, added in order: repeatable

Each act is z gate(z). The gate is the sigmoid of z (silu), 1.702 z (quick_gelu) or 2 sqrt(2/pi) (z + 0.044715 z^3)
(gelu_tanh); for gelu it is the normal distribution Phi(z), by Abramowitz and Stegun 7.1.26 (absolute error below
7.5e-8, less than fp32 torch loses in 1 + erf), whose exponential the derivative needs anyway.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose, launch, primitive, run, wide

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]


def activation_reference(z: Tensor, activation: str) -> Tensor:
    """act(z), any shape."""
    if activation == "silu":
        return F.silu(z)
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def projector_mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """x [N, K], w1 [H, K], b1 [H], w2 [D, H], b2 [D] -> [N, D] in x's dtype."""
    hidden = activation_reference(F.linear(wide(x), wide(w1), wide(b1)), activation)
    return F.linear(hidden, wide(w2), wide(b2)).to(x.dtype)


@triton.jit
def activate(z: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """act(z) and act'(z) of an fp32 block."""
    if ACT == "gelu":
        density = tl.exp(-0.5 * z * z)
        t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(z))
        series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        tail = 0.5 * t * series * density  # Phi(-|z|)
        gate = tl.where(z < 0, tail, 1.0 - tail)
        slope = 0.3989422804014327 * density
    elif ACT == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * z * z) * gate * (1.0 - gate)
    elif ACT == "quick_gelu":
        gate = tl.sigmoid(1.702 * z)
        slope = 1.702 * gate * (1.0 - gate)
    else:
        gate = tl.sigmoid(z)
        slope = gate * (1.0 - gate)
    return z * gate, gate + z * slope


@triton.jit
def bias_act_forward_kernel(
    z_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    a_ptr: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None] * channels + cols[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
    a, _ = activate(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias, ACT)
    tl.store(a_ptr + at, a, mask=inside)


@triton.jit
def bias_act_backward_kernel(
    da_ptr: tl.tensor,
    z_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    a_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: COLS channels of CHUNK tokens; their sum of dz goes into partial [chunks, H]."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    bias = tl.load(bias_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = tl.program_id(0) * CHUNK + start + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
        at = rows.to(tl.int64)[:, None] * channels + cols[None, :]
        a, slope = activate(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias, ACT)
        dz = tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(a_ptr + at, a, mask=inside)
        tl.store(dz_ptr + at, dz, mask=inside)
        total += tl.sum(dz, axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * channels + cols, total, mask=cols < channels)


def _forward_outputs(z: Tensor, bias: Tensor, activation: str) -> Tensor:
    return z.new_empty(z.shape)


@primitive("bias_act_forward(Tensor z, Tensor bias, str activation) -> Tensor", fake=_forward_outputs)
def bias_act_forward(z: Tensor, bias: Tensor, activation: str) -> Tensor:
    """z [N, H], bias [H], both contiguous -> act(z + bias) in z's dtype."""
    a = _forward_outputs(z, bias, activation)
    tokens, channels = z.shape
    config = launch("bias_act_forward", channels, z)
    run(
        bias_act_forward_kernel,
        (triton.cdiv(tokens, config.rows), triton.cdiv(channels, config.cols)),
        config,
        z,
        bias,
        a,
        tokens,
        channels,
        ACT=activation,
    )
    return a


def _backward_outputs(da: Tensor, z: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape[1], dtype=torch.float32)


@primitive(
    "bias_act_backward(Tensor da, Tensor z, Tensor bias, str activation) -> (Tensor, Tensor, Tensor)",
    fake=_backward_outputs,
)
def bias_act_backward(da: Tensor, z: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """da, z [N, H], bias [H], all contiguous -> dz [N, H], a [N, H], dbias [H] fp32."""
    dz, a = z.new_empty(z.shape), z.new_empty(z.shape)
    tokens, channels = z.shape
    config = launch("bias_act_backward", channels, z)
    chunks = triton.cdiv(tokens, config.chunk)
    partial = z.new_empty(chunks, channels, dtype=torch.float32)
    run(
        bias_act_backward_kernel,
        (chunks, triton.cdiv(channels, config.cols)),
        config,
        da,
        z,
        bias,
        dz,
        a,
        partial,
        tokens,
        channels,
        ACT=activation,
    )
    return dz, a, partial.sum(0)


def _product32(left: Tensor, right: Tensor) -> Tensor:
    """left [M, N] @ right [N, P] with an fp32 result."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _ProjectorMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        z = x @ w1.to(x.dtype).T
        ctx.save_for_backward(x, z, w1, b1, w2)
        ctx.activation = activation
        return torch.addmm(b2.to(x.dtype), bias_act_forward(z, b1, activation), w2.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, w1, b1, w2 = ctx.saved_tensors
        dz, a, db1 = bias_act_backward(dy @ w2.to(x.dtype), z, b1, ctx.activation)
        dx = dz @ w1.to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:5]):
            return dx, None, None, None, None, None
        return dx, _product32(dz.T, x), db1, _product32(dy.T, a), dy.sum(0, dtype=torch.float32), None


def projector_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: Activation) -> Tensor:
    """Project x [N, K] with w1 [H, K], b1 [H], w2 [D, H], b2 [D]; returns [N, D] in x's dtype.

    Gradients for all five tensors, the parameters' computed in fp32.
    Raises ValueError for an unknown activation or where the shapes do not fit.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation got {activation!r}; accepted: {', '.join(get_args(Activation))}")
    h, d = w1.shape[0], w2.shape[0]
    if x.ndim != 2 or w1.shape != (h, x.shape[1]) or b1.shape != (h,) or w2.shape != (d, h) or b2.shape != (d,):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (x, w1, b1, w2, b2))
        raise ValueError(f"projector_mlp takes x [N, K], w1 [H, K], b1 [H], w2 [D, H], b2 [D]; got {got}")
    if choose("projector_mlp", x, ("triton", "reference")) == "reference":
        return projector_mlp_reference(x, w1, b1, w2, b2, activation)
    return cast(Tensor, _ProjectorMLP.apply(x, w1, b1.contiguous(), w2, b2, activation))  # type: ignore[no-untyped-call]
