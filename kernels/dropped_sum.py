"""Sum of two branches, each through dropout: y = drop_s(a) + drop_{s+1}(b), or drop_s(a) alone.

    drop_s(x)[t, c] = x[t, c] keep(seed, s, t D + c) / (1 - p)         da = drop_s(dy), db = drop_{s+1}(dy)

a, b, y [T, D] of one dtype, fp16, bf16 or fp32; maths in fp32, rounded once. Phi's residual dropout (p = 0.1 in Phi-2):
attention and MLP add to the stream what passed through dropout, in training. keep is the counter hash of dropout.py, on
a token's place in the pack: no mask is stored, nothing but the seed is saved, and the kernels agree with `keep_mask`
bit for bit. torch's expression draws and stores two masks, and its sum reads back what two dropouts wrote.

    forward    reads a, b, writes y         3 streams of T x D; of one branch 2
    backward   reads dy, writes da, db      3 streams; of one branch 2

Two hashes are 36 to 38 instructions of the integer pipe an element (shifts, logic; in the code compiled for sm_80 and
sm_90), of which a multiprocessor does 64 a clock. So the prediction, from the cards' own rates: 1.8 times as long as
the traffic takes on an H200, 1.1 times on an A100, and 0.6 times, hidden behind it, on an RTX 3090.
Elements are independent: tensors without gaps are one long row.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activation import extent, tile
from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide
from kernels.dropout import keep, keep_mask, threshold
from kernels.launches import ANY


def dropped_sum_reference(a: Tensor, b: Tensor | None, dropout: float, seed: Tensor, site: int) -> Tensor:
    """a, b [T, D] -> [T, D] in a's dtype."""
    tokens, channels = a.shape
    kept = wide(a) * keep_mask(seed, site, tokens, channels, dropout, a.device)
    if b is not None:
        kept = kept + wide(b) * keep_mask(seed, site + 1, tokens, channels, dropout, a.device)
    return (kept / (1.0 - dropout)).to(a.dtype)


@triton.jit(do_not_specialize=["site", "limit"])
def dropped_sum_forward_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor | None,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    a_stride: tl.tensor,
    b_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS]. FAR: its places in the tensor need 64 bits."""
    row, cols = tile(channels, ROWS, COLS)
    rows = row + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    index = (at if FAR else rows[:, None]) * channels + cols[None, :]
    seed = tl.load(seed_ptr)
    a = tl.load(a_ptr + at * a_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.where(keep(seed, site, index, limit), a, 0.0)
    if b_ptr is not None:
        b = tl.load(b_ptr + at * b_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        y += tl.where(keep(seed, site + 1, index, limit), b, 0.0)
    tl.store(y_ptr + index, y * kept_scale, mask=inside)


@triton.jit(do_not_specialize=["site", "limit"])
def dropped_sum_backward_kernel(
    dy_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    da_ptr: tl.tensor,
    db_ptr: tl.tensor,
    dy_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: a tile [ROWS, COLS] of both gradients."""
    row, cols = tile(channels, ROWS, COLS)
    rows = row + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    at = rows.to(tl.int64)[:, None]
    index = (at if FAR else rows[:, None]) * channels + cols[None, :]
    seed = tl.load(seed_ptr)
    dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32) * kept_scale
    tl.store(da_ptr + index, tl.where(keep(seed, site, index, limit), dy, 0.0), mask=inside)
    tl.store(db_ptr + index, tl.where(keep(seed, site + 1, index, limit), dy, 0.0), mask=inside)


def _forward_outputs(a: Tensor, *_: object) -> Tensor:
    return a.new_empty(a.shape)


@primitive(
    "dropped_sum_forward(Tensor a, Tensor? b, float dropout, Tensor seed, int site) -> Tensor", fake=_forward_outputs
)
def dropped_sum_forward(a: Tensor, b: Tensor | None, dropout: float, seed: Tensor, site: int) -> Tensor:
    """a, b [T, D] with unit last stride -> y [T, D]; b None: drop_site(a)."""
    y = _forward_outputs(a)
    tokens, channels = extent(a) if b is None else extent(a, b)
    config = launch("dropped_sum_forward", channels, a)
    grid = (triton.cdiv(tokens, config.rows) * triton.cdiv(channels, config.cols),)
    run(
        dropped_sum_forward_kernel, grid, config,
        a, b, seed, y, a.stride(0), 0 if b is None else b.stride(0), tokens, channels, site, threshold(dropout),
        1.0 / (1.0 - dropout), FAR=a.numel() > ANY,
    )  # fmt: skip
    return y


def _backward_outputs(dy: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape)


@primitive(
    "dropped_sum_backward(Tensor dy, float dropout, Tensor seed, int site) -> (Tensor, Tensor)", fake=_backward_outputs
)
def dropped_sum_backward(dy: Tensor, dropout: float, seed: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """dy [T, D] with unit last stride -> da, db [T, D]."""
    da, db = _backward_outputs(dy)
    tokens, channels = extent(dy)
    config = launch("dropped_sum_backward", channels, dy)
    grid = (triton.cdiv(tokens, config.rows) * triton.cdiv(channels, config.cols),)
    run(
        dropped_sum_backward_kernel, grid, config,
        dy, seed, da, db, dy.stride(0), tokens, channels, site, threshold(dropout), 1.0 / (1.0 - dropout),
        FAR=dy.numel() > ANY,
    )  # fmt: skip
    return da, db


class _DroppedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, dropout: float, seed: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout, ctx.site = dropout, site
        return dropped_sum_forward(a, b, dropout, seed, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,), dy = ctx.saved_tensors, unit_stride(dy)
        need_a, need_b, *_ = ctx.needs_input_grad
        if need_a and need_b:
            return *dropped_sum_backward(dy, ctx.dropout, seed, ctx.site), None, None, None
        only = dropped_sum_forward(dy, None, ctx.dropout, seed, ctx.site if need_a else ctx.site + 1)
        return only if need_a else None, only if need_b else None, None, None, None


def dropped_sum(a: Tensor, b: Tensor | None, *, dropout: float, seed: Tensor | None, site: int) -> Tensor:
    """drop_site(a) + drop_{site+1}(b) for a, b [T, D] of one shape and dtype, or drop_site(a) where b is None.

    dropout in [0, 1); seed: int64 [1] on the tensors' device, None switches dropout off; site: non-negative, site + 1
    below 2^31. Without dropout it is a + b, or a itself. Raises ValueError where these do not fit.
    """
    if a.ndim != 2 or (b is not None and (b.shape != a.shape or b.dtype != a.dtype)):
        got = "None" if b is None else f"{tuple(b.shape)} {b.dtype}"
        raise ValueError(f"dropped_sum takes a, b [T, D] of one shape and dtype, got {tuple(a.shape)} {a.dtype}, {got}")
    if not threshold(dropout) or seed is None:
        return a if b is None else a + b
    if seed.shape != (1,) or seed.dtype != torch.int64 or site < 0:
        raise ValueError(f"dropped_sum takes a seed int64 [1] and a site from 0 on, got {seed.dtype} "
                         f"{tuple(seed.shape)} and {site}")  # fmt: skip
    if choose("dropped_sum", a, ("triton", "reference")) == "reference":
        return dropped_sum_reference(a, b, dropout, seed, site)
    a, b = unit_stride(a), None if b is None else unit_stride(b)
    return cast(Tensor, _DroppedSum.apply(a, b, dropout, seed, site))  # type: ignore[no-untyped-call]
