"""Linear layer and activation: a = act(x w^T + bias), by a product of our own or by cuBLAS and kernels/activation.py.

x [M, K], w [N, K] in one dtype (fp16, bf16, fp32), bias [N]; a [M, N] in x's dtype. The backward keeps z = x w^T beside
x and w, without the bias: kernels/activation.py computes act' from it again.

    cuBLAS     the product writes z; one kernel reads it, writes a                                3 passes over M x N
    own        bias and act on the product's tile, fp32 until a and z are rounded and written     2 passes, 1 without z

The own product pays where it computes as fast as cuBLAS. Where it does is measured (python -m benchmarks.projector) and
stands in OWN_PRODUCTS of kernels/launches.py; everywhere else it is cuBLAS.

One program computes one tile [ROWS, COLS] of a and walks over K in steps of INNER, its loads some steps ahead (fp32 in
fp32, without tensor cores). Programs go down a band of BAND tiles before they go right: those that run at one time
share rows of x and w in the L2 cache. Beyond M and N rows are read modulo M and N, and not written, so that only a K
that is no multiple of INNER needs masks. Each x is loaded once for COLS channels, each w once for ROWS tokens.
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

from kernels.activation import (
    Activation,
    activate,
    activation_reference,
    bias_act_backward,
    bias_act_forward,
    check_activation,
)
from kernels.dispatch import choose, launch, on_gpu, own_product, primitive, run, unit_stride, wide

BAND = 8


def linear_act_reference(x: Tensor, w: Tensor, bias: Tensor, activation: str) -> Tensor:
    """x [M, K], w [N, K], bias [N] -> [M, N] in x's dtype."""
    return activation_reference(F.linear(wide(x), wide(w), wide(bias)), activation).to(x.dtype)


@triton.jit
def linear_act_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    a_ptr: tl.tensor,
    z_ptr: tl.tensor | None,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    ACT: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS] of a and, unless its pointer is None, of z."""
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    band = tl.program_id(0) // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    in_band = tl.program_id(0) % (BAND * across)
    rows = (band * BAND + in_band % height) * ROWS + tl.arange(0, ROWS)
    cols = in_band // height * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    x_at = x_ptr + (rows % M).to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_at = w_ptr + (cols % N).to(tl.int64)[None, :] * w_stride + inner[:, None]
    z = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, K, INNER):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            left = inner < K - start
            x = tl.load(x_at, mask=left[None, :], other=0.0)
            w = tl.load(w_at, mask=left[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")
        x_at += INNER
        w_at += INNER
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, z, mask=inside)
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    a, _ = activate(z + bias[None, :], ACT)
    tl.store(a_ptr + at, a, mask=inside)


def _forward_outputs(x: Tensor, w: Tensor, bias: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], w.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@primitive(
    "linear_act_forward(Tensor x, Tensor w, Tensor bias, str activation, bool keep) -> (Tensor, Tensor)",
    fake=_forward_outputs,
)
def linear_act_forward(x: Tensor, w: Tensor, bias: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """x [M, K], w [N, K] of one dtype with unit last strides, bias [N] contiguous -> a and z [M, N]; z is empty unless
    `keep`."""
    a, z = _forward_outputs(x, w, bias, activation, keep)
    (m, k), n = x.shape, w.shape[0]
    size = 0 if x.dtype == torch.float32 else triton.cdiv(m, 128) * triton.cdiv(n, 256)
    config = launch("linear_act", size, x)
    run(
        linear_act_kernel, (triton.cdiv(m, config.rows) * triton.cdiv(n, config.cols),), config,
        x, w, bias, a, z if keep else None, x.stride(0), w.stride(0), m, n, k,
        ACT=activation, BAND=BAND, EVEN_K=k % config.inner == 0,
    )  # fmt: skip
    return a, z


def product_and_act(
    x: Tensor, w: Tensor, bias: Tensor, activation: str, *, keep: bool, own: bool | None
) -> tuple[Tensor, Tensor]:
    """a = act(x w^T + bias) and, where it is to be kept, z = x w^T, without autograd; w in x's dtype.

    own: by our own product (True), by cuBLAS (False), or as OWN_PRODUCTS says (None).
    """
    if own_product(x, w.shape[0]) if own is None else own:
        return linear_act_forward(unit_stride(x), unit_stride(w), bias, activation, keep)
    z = x @ w.T
    return bias_act_forward(z, bias, activation), z


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [M, N], x [M, K] in one dtype -> dw = dy^T x [N, K] in the weight's dtype, rounded to it once."""
    if dtype == dy.dtype:
        return dy.T @ x
    if on_gpu(dy) and dtype == torch.float32:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return (dy.T.float() @ x.float()).to(dtype)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor, activation: str, own: bool | None) -> Tensor:
        needs_x, needs_w = ctx.needs_input_grad[:2]
        a, z = product_and_act(x, w.to(x.dtype), bias, activation, keep=any(ctx.needs_input_grad), own=own)
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None, bias, z)
        ctx.activation, ctx.w_dtype = activation, w.dtype
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, z = ctx.saved_tensors
        needs_x, needs_w, needs_bias, *_ = ctx.needs_input_grad
        dz = torch.empty_like(z)
        dbias = bias_act_backward(unit_stride(da), z, bias, dz, None, ctx.activation, needs_bias)
        dx = dz @ w.to(dz.dtype) if needs_x else None
        dw = weight_gradient(dz, x, ctx.w_dtype) if needs_w else None
        return dx, dw, dbias if needs_bias else None, None, None


def linear_act(x: Tensor, w: Tensor, bias: Tensor, activation: Activation, *, own: bool | None = None) -> Tensor:
    """act(x w^T + bias) of x [M, K], w [N, K], bias [N]; returns [M, N] in x's dtype.

    w and bias may be fp32 beside a 16-bit x. Gradients for those of the three that require one, w's and bias's summed
    in fp32. own: by our own product (True), by cuBLAS (False), or by the faster one (None).
    Raises ValueError for an unknown activation or where the shapes do not fit.
    """
    check_activation(activation)
    if x.ndim != 2 or w.ndim != 2 or w.shape[1] != x.shape[1] or bias.shape != w.shape[:1]:
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (x, w, bias))
        raise ValueError(f"linear_act takes x [M, K], w [N, K], bias [N]; got {got}")
    if choose("linear_act", x, ("triton", "reference")) == "reference":
        return linear_act_reference(x, w, bias, activation)
    return cast(Tensor, _LinearAct.apply(x, w, bias.contiguous(), activation, own))  # type: ignore[no-untyped-call]
