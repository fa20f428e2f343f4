"""Triton kernels for the parameters of norm_mma.py, which has the formulas, the layouts and the launchers.

Slots as in norm_mma_tiles.py, here of one group: [ROWS, 4 G].
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_mma_pack_kernel(
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor | None,
    down_w_ptr: tl.tensor,
    down_b_ptr: tl.tensor,
    up0_w_ptr: tl.tensor,
    up0_b_ptr: tl.tensor,
    up1_w_ptr: tl.tensor,
    up1_b_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    scale: tl.tensor,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: one row of packed; a row of its first h, two elements of affine too."""
    row = tl.program_id(0)
    slot = row - H
    total = tl.zeros([COLS], dtype=tl.float32)
    shift = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, CHANNELS, COLS):
        cols = start + tl.arange(0, COLS)
        inside = cols < CHANNELS
        weight = tl.load(norm_weight_ptr + cols, mask=inside & (slot < 0), other=0.0).to(tl.float32)
        down = tl.load(down_w_ptr + row * CHANNELS + cols, mask=inside & (slot < 0), other=0.0)
        at = cols * (H // 2) + slot % (H // 2)
        up = tl.load(up0_w_ptr + at, mask=inside & (slot >= 0) & (slot < H // 2), other=0.0)
        up += tl.load(up1_w_ptr + at, mask=inside & (slot >= H // 2) & (slot < H), other=0.0)
        up += tl.load(up0_b_ptr + cols, mask=inside & (slot == H), other=0.0)
        up += tl.load(up1_b_ptr + cols, mask=inside & (slot == H + 1), other=0.0)
        packed = (weight * down + scale * up).to(packed_ptr.dtype.element_ty)
        tl.store(packed_ptr + row * CHANNELS + cols, packed, mask=inside)
        total += packed.to(tl.float32)
        if norm_bias_ptr is not None:
            shift += down * tl.load(norm_bias_ptr + cols, mask=inside & (slot < 0), other=0.0).to(tl.float32)
    down_b = tl.load(down_b_ptr + row, mask=slot < 0, other=0.0)
    tl.store(affine_ptr + row, down_b + tl.sum(shift, axis=0), mask=slot < 0)
    tl.store(affine_ptr + H + row, tl.sum(total, axis=0), mask=slot < 0)


@triton.jit
def add_product(total: tl.tensor, left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """total + left^T right. left is fp32, and made 16 bits in units of its columns' largest: fp16 has little range."""
    largest = tl.maximum(tl.max(tl.abs(left), axis=0), 1e-30)
    left = tl.trans((left / largest[None, :]).to(right.dtype))
    return total + largest[:, None] * tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "chunk"])
def norm_mma_dadapter_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor | None,
    mix_ptr: tl.tensor,
    row_ptr: tl.tensor | None,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    u_ptr: tl.tensor,
    du_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    scale: tl.tensor,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: COLS channels of a group, `chunk` tokens, into its row of partial: the six gradients in a row."""
    TILES: tl.constexpr = (CHANNELS // 2 - 1) // COLS + 1
    group = tl.program_id(0) // TILES
    within = tl.program_id(0) % TILES * COLS + tl.arange(0, COLS)
    column = within < CHANNELS // 2
    cols = group * (CHANNELS // 2) + within
    slot = tl.arange(0, 4 * G)
    path = slot // G % 2
    is_code = (slot < 2 * G) & (slot % G < H // 2)
    dup = tl.zeros([4 * G, COLS], dtype=tl.float32)
    ddown = tl.zeros([4 * G, COLS], dtype=tl.float32)
    ddown_b = tl.zeros([4 * G], dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < tokens
        at = rows.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=live[:, None] & column[None, :], other=0.0)
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=live[:, None] & column[None, :], other=0.0)
        router = (rows if row_ptr is None else tl.load(row_ptr + rows, mask=live, other=0)).to(tl.int64)
        m = tl.load(mix_ptr + router[:, None] * 2 + path[None, :], mask=live[:, None], other=0.0)
        codes_there = live[:, None] & is_code[None, :]
        u = tl.load(u_ptr + at * H + (group * (H // 2) + slot % G)[None, :], mask=codes_there, other=0.0)
        v = m * tl.where((slot < 2 * G)[None, :], u, 1.0)
        dup = add_product(dup, v, dy)
        du = tl.load(du_ptr + at * H + (path * (H // 2) + slot % G)[None, :], mask=codes_there, other=0.0)
        ddown_b += tl.sum(du, axis=0)
        if norm_bias_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=live, other=0.0)[:, None]
            x = (x.to(tl.float32) - mean).to(x.dtype)
        ddown = add_product(ddown, du * tl.load(rstd_ptr + rows, mask=live, other=0.0)[:, None], x)

    weight = tl.load(norm_weight_ptr + cols, mask=column, other=0.0).to(tl.float32)
    ddown *= weight[None, :]
    if norm_bias_ptr is not None:
        bias = tl.load(norm_bias_ptr + cols, mask=column, other=0.0).to(tl.float32)
        ddown += ddown_b[:, None] * bias[None, :]
    code = path * (H // 2) + slot % G
    half = CHANNELS * (H // 2)
    here = partial_ptr + tl.program_id(1).to(tl.int64) * (CHANNELS * H + H + 2 * (half + CHANNELS))
    there = is_code[:, None] & column[None, :]
    tl.store(here + code[:, None] * CHANNELS + cols[None, :], ddown, mask=there)
    here += CHANNELS * H
    tl.store(here + code, ddown_b, mask=is_code & (tl.program_id(0) == 0))
    here += H + path[:, None] * (half + CHANNELS)
    tl.store(here + cols[None, :] * (H // 2) + (slot % G)[:, None], scale * dup, mask=there)
    bias_there = ((slot >= 2 * G) & (slot % G == 0))[:, None] & column[None, :]
    tl.store(here + half + cols[None, :], scale * dup, mask=bias_there)


@triton.jit
def norm_mma_dmix_kernel(
    dm_ptr: tl.tensor, row_ptr: tl.tensor, dmix_ptr: tl.tensor, tokens: tl.tensor, ROWS: tl.constexpr
) -> None:
    """One program: one router row, over all tokens."""
    path = tl.arange(0, 2)[:, None]
    total = tl.zeros([2, ROWS], dtype=tl.float32)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        mine = tl.load(row_ptr + rows, mask=rows < tokens, other=-1) == tl.program_id(0)
        total += tl.load(dm_ptr + rows.to(tl.int64)[None, :] * 2 + path, mask=mine[None, :], other=0.0)
    tl.store(dmix_ptr + tl.program_id(0) * 2 + path, tl.sum(total, axis=1, keep_dims=True))
