"""Triton kernels of norm_mma.py, which has the formulas, the layout and the launchers.

Names as there. ROWS and COLS: tile of tokens and channels; H: the code's width h; K >= 2h: the padded width of v, W and
both copies of the code, a power of two and at least 16 (tl.dot's smallest). PRECISION: tl.dot's input precision.
An absent norm_bias means RMSNorm, an absent row that token t has router row t, an absent seed no dropout.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kernels.dropout import keep


@triton.jit
def load_normed(
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor | None,
    x_stride: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    inside: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
) -> tl.tensor:
    """n as fp32 [ROWS, COLS], rounded as the plain norms round it. mean (LayerNorm only), rstd: [ROWS]."""
    x_raw = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=inside, other=0.0)
    weight = tl.load(norm_weight_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
    if norm_bias_ptr is None:
        n = (x_raw.to(tl.float32) * rstd[:, None]).to(x_raw.dtype).to(tl.float32) * weight
    else:
        bias = tl.load(norm_bias_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
        n = (x_raw.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight + bias
    return n.to(x_raw.dtype).to(tl.float32)


@triton.jit
def load_down(down_ptr: tl.tensor, channels: tl.tensor, cols: tl.tensor, H: tl.constexpr, K: tl.constexpr) -> tl.tensor:
    """[down_w ; down_w] as [K, COLS], zero from row 2h on."""
    k = tl.arange(0, K)
    inside = (k < 2 * H)[:, None] & (cols < channels)[None, :]
    return tl.load(down_ptr + (k % H)[:, None] * channels + cols[None, :], mask=inside, other=0.0)


@triton.jit
def up_offsets(channels: tl.tensor, cols: tl.tensor, H: tl.constexpr, K: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where row k of W [K, COLS] lies in up_p_w [D, h/2], and whether column and code are of one group."""
    code = tl.arange(0, K) % H
    offset = cols[None, :] * (H // 2) + (code % (H // 2))[:, None]
    same_group = (code >= H // 2)[:, None] == (cols >= channels // 2)[None, :]
    return offset, same_group & (cols < channels)[None, :]


@triton.jit
def load_up(
    up0_ptr: tl.tensor, up1_ptr: tl.tensor, channels: tl.tensor, cols: tl.tensor, H: tl.constexpr, K: tl.constexpr
) -> tl.tensor:
    """W = [up_0 ; up_1] as [K, COLS], zero outside a code's group and from row 2h on."""
    k = tl.arange(0, K)
    offset, inside = up_offsets(channels, cols, H, K)
    w0 = tl.load(up0_ptr + offset, mask=inside & (k < H)[:, None], other=0.0)
    return w0 + tl.load(up1_ptr + offset, mask=inside & (k >= H)[:, None] & (k < 2 * H)[:, None], other=0.0)


@triton.jit
def load_mix(
    mix_ptr: tl.tensor, row_ptr: tl.tensor | None, rows: tl.tensor, tokens: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """m0, m1 of each token, [ROWS] each."""
    row = rows if row_ptr is None else tl.load(row_ptr + rows, mask=rows < tokens, other=0)
    at = row.to(tl.int64)
    m0 = tl.load(mix_ptr + at * 2, mask=rows < tokens, other=0.0)
    return m0, tl.load(mix_ptr + at * 2 + 1, mask=rows < tokens, other=0.0)


@triton.jit
def drop(
    u: tl.tensor,
    seed_ptr: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Inverted dropout of [ROWS, K]; both copies of a code share its mask."""
    index = rows.to(tl.int64)[:, None] * H + (tl.arange(0, K) % H)[None, :]
    return tl.where(keep(tl.load(seed_ptr), site, index, limit), u * kept_scale, 0.0)


@triton.jit(do_not_specialize=["site", "limit"])
def norm_mma_forward_kernel(
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor | None,
    down_w_ptr: tl.tensor,
    down_b_ptr: tl.tensor,
    up0_w_ptr: tl.tensor,
    up0_b_ptr: tl.tensor,
    up1_w_ptr: tl.tensor,
    up1_b_ptr: tl.tensor,
    mix_ptr: tl.tensor,
    row_ptr: tl.tensor | None,
    seed_ptr: tl.tensor | None,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    u_ptr: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One program: ROWS tokens. Sweeps over the channels: statistics, u, y."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < tokens
    at = rows.to(tl.int64)[:, None]
    k = tl.arange(0, K)

    mean = tl.zeros([ROWS], dtype=tl.float32)
    if norm_bias_ptr is not None:
        for start in range(0, channels, COLS):
            cols = start + tl.arange(0, COLS)
            inside = live[:, None] & (cols < channels)[None, :]
            x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            mean += tl.sum(x, axis=1)
        mean = mean / channels
        tl.store(mean_ptr + rows, mean, mask=live)
    square = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, channels, COLS):
        cols = start + tl.arange(0, COLS)
        inside = live[:, None] & (cols < channels)[None, :]
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - mean[:, None], 0.0)
        square += tl.sum(x * x, axis=1)
    rstd = 1.0 / tl.sqrt_rn(square / channels + eps)
    tl.store(rstd_ptr + rows, rstd, mask=live)

    u = tl.zeros([ROWS, K], dtype=tl.float32)
    for start in range(0, channels, COLS):
        cols = start + tl.arange(0, COLS)
        inside = live[:, None] & (cols < channels)[None, :]
        n = load_normed(x_ptr, norm_weight_ptr, norm_bias_ptr, x_stride, channels, rows, cols, inside, mean, rstd)
        down = load_down(down_w_ptr, channels, cols, H, K)
        u = tl.dot(n, tl.trans(down), acc=u, input_precision=PRECISION)
    u += tl.load(down_b_ptr + k % H)[None, :]
    if seed_ptr is not None:
        u = drop(u, seed_ptr, site, limit, kept_scale, rows, H, K)
    tl.store(u_ptr + at * H + k[None, :], u, mask=live[:, None] & (k < H)[None, :])

    m0, m1 = load_mix(mix_ptr, row_ptr, rows, tokens)
    v = u * tl.where((k < H)[None, :], m0[:, None], m1[:, None])
    for start in range(0, channels, COLS):
        cols = start + tl.arange(0, COLS)
        inside = live[:, None] & (cols < channels)[None, :]
        n = load_normed(x_ptr, norm_weight_ptr, norm_bias_ptr, x_stride, channels, rows, cols, inside, mean, rstd)
        b0 = tl.load(up0_b_ptr + cols, mask=cols < channels, other=0.0)[None, :]
        b1 = tl.load(up1_b_ptr + cols, mask=cols < channels, other=0.0)[None, :]
        e = tl.dot(v, load_up(up0_w_ptr, up1_w_ptr, channels, cols, H, K), input_precision=PRECISION)
        y = n + scale * (e + m0[:, None] * b0 + m1[:, None] * b1)
        tl.store(y_ptr + at * channels + cols[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["site", "limit"])
def norm_mma_backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    down_w_ptr: tl.tensor,
    up0_w_ptr: tl.tensor,
    up0_b_ptr: tl.tensor,
    up1_w_ptr: tl.tensor,
    up1_b_ptr: tl.tensor,
    mix_ptr: tl.tensor,
    row_ptr: tl.tensor | None,
    seed_ptr: tl.tensor | None,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    u_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    du_ptr: tl.tensor,
    dm_ptr: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    scale: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    LAYER_NORM: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One program: ROWS tokens. Sweeps over the channels: dv, the norm's two sums, dx."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < tokens
    at = rows.to(tl.int64)[:, None]
    k = tl.arange(0, K)

    dv = tl.zeros([ROWS, K], dtype=tl.float32)
    dot_b0 = tl.zeros([ROWS], dtype=tl.float32)
    dot_b1 = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, channels, COLS):
        cols = start + tl.arange(0, COLS)
        inside = live[:, None] & (cols < channels)[None, :]
        dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        up = load_up(up0_w_ptr, up1_w_ptr, channels, cols, H, K)
        dv = tl.dot(dy, tl.trans(up), acc=dv, input_precision=PRECISION)
        dot_b0 += tl.sum(dy * tl.load(up0_b_ptr + cols, mask=cols < channels, other=0.0)[None, :], axis=1)
        dot_b1 += tl.sum(dy * tl.load(up1_b_ptr + cols, mask=cols < channels, other=0.0)[None, :], axis=1)
    dv *= scale
    codes = live[:, None] & (k < 2 * H)[None, :]
    dm = dv * tl.load(u_ptr + at * H + (k % H)[None, :], mask=codes, other=0.0)
    dm0 = tl.sum(tl.where((k < H)[None, :], dm, 0.0), axis=1) + scale * dot_b0
    dm1 = tl.sum(tl.where((k < H)[None, :], 0.0, dm), axis=1) + scale * dot_b1
    tl.store(dm_ptr + rows.to(tl.int64) * 2, dm0, mask=live)
    tl.store(dm_ptr + rows.to(tl.int64) * 2 + 1, dm1, mask=live)
    m0, m1 = load_mix(mix_ptr, row_ptr, rows, tokens)
    du = dv * tl.where((k < H)[None, :], m0[:, None], m1[:, None])
    if seed_ptr is not None:
        du = drop(du, seed_ptr, site, limit, kept_scale, rows, H, K)
    tl.store(du_ptr + at * (2 * H) + k[None, :], du, mask=codes)

    rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
    mean = tl.zeros([ROWS], dtype=tl.float32)
    if LAYER_NORM:
        mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
    sum_g = tl.zeros([ROWS], dtype=tl.float32)
    sum_gx = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, channels, COLS):
        cols = start + tl.arange(0, COLS)
        inside = live[:, None] & (cols < channels)[None, :]
        dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dn = tl.dot(du, load_down(down_w_ptr, channels, cols, H, K), acc=dy, input_precision=PRECISION)
        g = dn * tl.load(norm_weight_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_g += tl.sum(g, axis=1)
        sum_gx += tl.sum(g * (x - mean[:, None]) * rstd[:, None], axis=1)
    mean_g = sum_g / channels if LAYER_NORM else tl.zeros([ROWS], dtype=tl.float32)
    mean_gx = sum_gx / channels
    for start in range(0, channels, COLS):
        cols = start + tl.arange(0, COLS)
        inside = live[:, None] & (cols < channels)[None, :]
        dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dn = tl.dot(du, load_down(down_w_ptr, channels, cols, H, K), acc=dy, input_precision=PRECISION)
        g = dn * tl.load(norm_weight_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        tl.store(dx_ptr + at * channels + cols[None, :], dx, mask=inside)


@triton.jit
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
    channels: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One program: COLS channels, CHUNK tokens, into its row of partial: the six gradients one after another."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    k = tl.arange(0, K)
    dup = tl.zeros([K, COLS], dtype=tl.float32)
    ddown = tl.zeros([K, COLS], dtype=tl.float32)
    db0 = tl.zeros([COLS], dtype=tl.float32)
    db1 = tl.zeros([COLS], dtype=tl.float32)
    ddown_b = tl.zeros([K], dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = tl.program_id(1) * CHUNK + start + tl.arange(0, ROWS)
        live = rows < tokens
        at = rows.to(tl.int64)[:, None]
        inside = live[:, None] & (cols < channels)[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
        mean = rstd
        if norm_bias_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
        n = load_normed(x_ptr, norm_weight_ptr, norm_bias_ptr, x_stride, channels, rows, cols, inside, mean, rstd)
        dy = tl.load(dy_ptr + at * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        m0, m1 = load_mix(mix_ptr, row_ptr, rows, tokens)
        u = tl.load(u_ptr + at * H + (k % H)[None, :], mask=live[:, None] & (k < 2 * H)[None, :], other=0.0)
        v = u * tl.where((k < H)[None, :], m0[:, None], m1[:, None])
        codes = live[:, None] & (k < H)[None, :]
        du = tl.load(du_ptr + at * (2 * H) + k[None, :], mask=codes, other=0.0)
        du += tl.load(du_ptr + at * (2 * H) + H + k[None, :], mask=codes, other=0.0)
        dup = tl.dot(tl.trans(v), dy, acc=dup, input_precision=PRECISION)
        ddown = tl.dot(tl.trans(du), n, acc=ddown, input_precision=PRECISION)
        ddown_b += tl.sum(du, axis=0)
        db0 += tl.sum(m0[:, None] * dy, axis=0)
        db1 += tl.sum(m1[:, None] * dy, axis=0)

    half = channels * (H // 2)
    here = partial_ptr + tl.program_id(1).to(tl.int64) * (channels * H + H + 2 * (half + channels))
    column = cols < channels
    tl.store(here + k[:, None] * channels + cols[None, :], ddown, mask=(k < H)[:, None] & column[None, :])
    here += channels * H
    tl.store(here + k, ddown_b, mask=(k < H) & (tl.program_id(0) == 0))
    here += H
    offset, inside = up_offsets(channels, cols, H, K)
    tl.store(here + offset, scale * dup, mask=inside & (k < H)[:, None])
    tl.store(here + half + cols, scale * db0, mask=column)
    here += half + channels
    tl.store(here + offset, scale * dup, mask=inside & (k >= H)[:, None] & (k < 2 * H)[:, None])
    tl.store(here + half + cols, scale * db1, mask=column)


@triton.jit
def norm_mma_dmix_kernel(
    dm_ptr: tl.tensor,
    row_ptr: tl.tensor,
    dmix_ptr: tl.tensor,
    tokens: tl.tensor,
    router_rows: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: COLS router rows, over all tokens."""
    routers = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total0 = tl.zeros([COLS], dtype=tl.float32)
    total1 = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        mine = tl.load(row_ptr + rows, mask=rows < tokens, other=-1)[:, None] == routers[None, :]
        at = rows.to(tl.int64) * 2
        total0 += tl.sum(tl.where(mine, tl.load(dm_ptr + at, mask=rows < tokens, other=0.0)[:, None], 0.0), axis=0)
        total1 += tl.sum(tl.where(mine, tl.load(dm_ptr + at + 1, mask=rows < tokens, other=0.0)[:, None], 0.0), axis=0)
    tl.store(dmix_ptr + routers * 2, total0, mask=routers < router_rows)
    tl.store(dmix_ptr + routers * 2 + 1, total1, mask=routers < router_rows)
