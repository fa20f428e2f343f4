"""Triton kernels over tokens of norm_mma.py, which has the formulas and the launchers; shapes as in norm_mma_tiles.py.

Both hold ROWS tokens and sweep twice over the tiles of a row, there and back, so that the tile which ends the first
sweep is in registers when the second begins with it. Each tile is loaded while the one before it is at work.

An absent delta or dstream is not read. An absent norm_bias means RMSNorm, an absent row that token t has router row t,
an absent seed no dropout. The number of tiles is no constant: the compiler would unroll the sweeps where it is small,
and run out of registers.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kernels.dropout import keep
from kernels.norm_mma_tiles import (
    add,
    by_eight,
    by_row,
    centred,
    codes,
    load_down,
    load_mix,
    load_tile,
    load_up,
    load_vector,
    tile_channels,
    to_bands,
    to_slots,
)


@triton.jit
def forward_sums(
    x: tl.tensor,
    delta: tl.tensor | None,
    shift: tl.tensor,
    packed_ptr: tl.tensor,
    stream_ptr: tl.tensor,
    i: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    product: tl.tensor,
    square: tl.tensor,
    total: tl.tensor,
    LAYER_NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Tile i of the stream, and the sums with it: (x - shift) down^T, (x - shift)^2, x - shift."""
    cols, inside = tile_channels(i, CHANNELS, COLS, x.shape[1])
    if delta is not None:
        x = add(x, delta)
        tl.store(stream_ptr + rows * CHANNELS + cols, x, mask=inside & live)
    value = centred(x, shift, inside, LAYER_NORM)
    square += by_eight(value * value)
    if LAYER_NORM:
        total += by_eight(value)
    down = tl.permute(load_down(packed_ptr, cols, inside, CHANNELS, H, G, 2 * G), (0, 2, 1))
    value = tl.permute(value.to(x.dtype), (1, 0, 2))
    return x, tl.dot(value, down, acc=product, input_precision="ieee"), square, total


@triton.jit(do_not_specialize=["tokens", "tiles", "site", "limit"])
def norm_mma_forward_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor | None,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor | None,
    packed_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    mix_ptr: tl.tensor,
    row_ptr: tl.tensor | None,
    seed_ptr: tl.tensor | None,
    stream_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    u_ptr: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    eps: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: ROWS tokens. A sweep over the tiles for the stream, the statistics and u, and one back for y."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    LAYER_NORM: tl.constexpr = norm_bias_ptr is not None
    first = tl.program_id(0).to(tl.int64) * ROWS
    x_ptr += first * x_stride
    if delta_ptr is not None:
        delta_ptr += first * delta_stride
    stream_ptr += first * CHANNELS
    y_ptr += first * CHANNELS
    rows = tl.arange(0, ROWS)[:, None, None]
    live = rows < tokens - first

    x = load_tile(x_ptr, x_stride, 0, rows, live, CHANNELS, COLS, BANDS)
    delta = load_tile(delta_ptr, delta_stride, 0, rows, live, CHANNELS, COLS, BANDS)
    shift = 0.0
    if LAYER_NORM:  # by the first tile's mean, so that the variance does not cancel; of one tile it is the row's
        shift = by_row(add(x, delta).to(tl.float32)) / min(COLS, CHANNELS)
    product = tl.zeros([BANDS, ROWS, 2 * G], dtype=tl.float32)
    square = tl.zeros([ROWS, BANDS, COLS // BANDS // 8], dtype=tl.float32)
    total = tl.zeros([ROWS, BANDS, COLS // BANDS // 8], dtype=tl.float32)
    for i in range(tiles - 1):
        next_x = load_tile(x_ptr, x_stride, i + 1, rows, live, CHANNELS, COLS, BANDS)
        next_delta = load_tile(delta_ptr, delta_stride, i + 1, rows, live, CHANNELS, COLS, BANDS)
        _, product, square, total = forward_sums(
            x, delta, shift, packed_ptr, stream_ptr, i, rows, live, product, square, total,
            LAYER_NORM, CHANNELS, COLS, H, G,
        )  # fmt: skip
        x = next_x
        if delta_ptr is not None:
            delta = next_delta
    x, product, square, total = forward_sums(
        x, delta, shift, packed_ptr, stream_ptr, tiles - 1, rows, live, product, square, total,
        LAYER_NORM, CHANNELS, COLS, H, G,
    )  # fmt: skip

    variance = by_row(square) / CHANNELS
    u = tl.reshape(tl.sum(product, axis=0), (ROWS, 2, G))
    mean = shift
    code, real = codes(tl.zeros_like(rows), H, G)
    if LAYER_NORM:
        beyond = by_row(total) / CHANNELS
        mean = shift + beyond
        variance = tl.maximum(variance - beyond * beyond, 0.0)
        u -= beyond * tl.load(affine_ptr + H + code, mask=real, other=0.0)
        tl.store(mean_ptr + first + rows, mean, mask=live)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd_ptr + first + rows, rstd, mask=live)
    u = rstd * u + tl.load(affine_ptr + code, mask=real, other=0.0)
    at, real = codes(rows, H, G)
    if seed_ptr is not None:
        u = tl.where(keep(tl.load(seed_ptr), site, first * H + at, limit), u * kept_scale, 0.0)
    tl.store(u_ptr + first * H + at, u, mask=live & real)

    v = to_slots(u) * load_mix(mix_ptr, row_ptr, first, ROWS, tokens)
    v = to_bands(tl.reshape(v, (2, ROWS, 4 * G)).to(DTYPE), BANDS)
    source_ptr = x_ptr
    source_stride = x_stride
    if delta_ptr is not None:
        tl.debug_barrier()  # what one thread wrote of the stream another reads
        source_ptr = stream_ptr
        source_stride = CHANNELS
    for i in range(tiles - 1, -1, -1):
        cols, inside = tile_channels(i, CHANNELS, COLS, BANDS)
        weight = load_vector(norm_weight_ptr, cols, inside, ROWS)
        if norm_bias_ptr is None:  # n is rounded as the plain norms round it
            n = (x.to(tl.float32) * rstd).to(DTYPE).to(tl.float32) * weight
        else:
            n = (x.to(tl.float32) - mean) * rstd * weight + load_vector(norm_bias_ptr, cols, inside, ROWS)
        x = load_tile(source_ptr, source_stride, i - 1, rows, live & (i > 0), CHANNELS, COLS, BANDS)
        n = tl.permute(n.to(DTYPE), (1, 0, 2)).to(tl.float32)
        y = tl.dot(v, load_up(packed_ptr, cols, inside, CHANNELS, H, G), acc=n, input_precision="ieee")
        tl.store(y_ptr + rows * CHANNELS + cols, tl.permute(y.to(DTYPE), (1, 0, 2)), mask=inside & live)


@triton.jit
def backward_sums(
    dy: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    norm_weight_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    i: tl.tensor,
    dv: tl.tensor,
    along: tl.tensor,
    level: tl.tensor,
    LAYER_NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sums with tile i: dy W^T, dy weight (x - mean), dy weight."""
    cols, inside = tile_channels(i, CHANNELS, COLS, x.shape[1])
    g = dy.to(tl.float32) * load_vector(norm_weight_ptr, cols, inside, x.shape[0])
    along += by_eight(g * (x.to(tl.float32) - mean))
    if LAYER_NORM:
        level += by_eight(g)
    up = tl.permute(load_up(packed_ptr, cols, inside, CHANNELS, H, G), (0, 2, 1))
    return tl.dot(tl.permute(dy, (1, 0, 2)), up, acc=dv, input_precision="ieee"), along, level


@triton.jit(do_not_specialize=["tokens", "tiles", "site", "limit"])
def norm_mma_backward_kernel(
    dy_ptr: tl.tensor,
    dstream_ptr: tl.tensor | None,
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    affine_ptr: tl.tensor,
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
    dstream_stride: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    LAYER_NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: ROWS tokens. A sweep over the tiles for dv and the norm's two sums, and one back for dx."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    dy_ptr += first * dy_stride
    if dstream_ptr is not None:
        dstream_ptr += first * dstream_stride
    x_ptr += first * x_stride
    dx_ptr += first * CHANNELS
    rows = tl.arange(0, ROWS)[:, None, None]
    live = rows < tokens - first

    dy = load_tile(dy_ptr, dy_stride, 0, rows, live, CHANNELS, COLS, BANDS)
    x = load_tile(x_ptr, x_stride, 0, rows, live, CHANNELS, COLS, BANDS)
    rstd = tl.load(rstd_ptr + first + rows, mask=live, other=0.0)
    mean = tl.load(mean_ptr + first + rows, mask=live, other=0.0) if LAYER_NORM else 0.0
    dv = tl.zeros([BANDS, ROWS, 4 * G], dtype=tl.float32)
    along = tl.zeros([ROWS, BANDS, COLS // BANDS // 8], dtype=tl.float32)
    level = tl.zeros([ROWS, BANDS, COLS // BANDS // 8], dtype=tl.float32)
    for i in range(tiles - 1):
        next_dy = load_tile(dy_ptr, dy_stride, i + 1, rows, live, CHANNELS, COLS, BANDS)
        next_x = load_tile(x_ptr, x_stride, i + 1, rows, live, CHANNELS, COLS, BANDS)
        dv, along, level = backward_sums(
            dy, x, mean, norm_weight_ptr, packed_ptr, i, dv, along, level,
            LAYER_NORM, CHANNELS, COLS, H, G,
        )  # fmt: skip
        dy = next_dy
        x = next_x
    dv, along, level = backward_sums(
        dy, x, mean, norm_weight_ptr, packed_ptr, tiles - 1, dv, along, level,
        LAYER_NORM, CHANNELS, COLS, H, G,
    )  # fmt: skip

    at, real = codes(rows, H, G)
    u = tl.load(u_ptr + first * H + at, mask=live & real, other=0.0)
    dv = tl.sum(tl.reshape(dv, (2, BANDS // 2, ROWS, 4 * G)), axis=1)
    dv = tl.reshape(dv, (2, ROWS, 2, 2, G))
    dm = tl.sum(tl.sum(tl.sum(dv * to_slots(u), axis=4), axis=2), axis=0)
    token = first + tl.arange(0, ROWS)[:, None]
    tl.store(dm_ptr + token * 2 + tl.arange(0, 2)[None, :], dm, mask=token < tokens)
    kind = tl.arange(0, 2)[None, None, :, None, None]
    du = tl.where(kind == 0, dv * load_mix(mix_ptr, row_ptr, first, ROWS, tokens), 0.0)
    du = tl.permute(tl.sum(tl.sum(du, axis=3), axis=2), (1, 0, 2))
    if seed_ptr is not None:
        du = tl.where(keep(tl.load(seed_ptr), site, first * H + at, limit), du * kept_scale, 0.0)
    tl.store(du_ptr + first * H + at, du, mask=live & real)

    code, real = codes(tl.zeros_like(rows), H, G)
    hidden = u / kept_scale - tl.load(affine_ptr + code, mask=real, other=0.0)  # xhat (weight down)^T where du is not 0
    along = rstd * ((rstd * by_row(along) + by_row(du * hidden)) / CHANNELS)
    if not LAYER_NORM:
        level = 0.0
    else:
        level = by_row(level) + by_row(du * tl.load(affine_ptr + H + code, mask=real, other=0.0))
        level = rstd * (level / CHANNELS)
    along *= rstd
    du = tl.where(tl.arange(0, 2)[None, :, None, None] == 0, du[:, None, :, :], 0.0)
    du = to_bands(tl.reshape(du, (1, ROWS, 4 * G)).to(DTYPE), BANDS)
    dstream = load_tile(dstream_ptr, dstream_stride, tiles - 1, rows, live, CHANNELS, COLS, BANDS)
    for i in range(tiles - 1, -1, -1):
        cols, inside = tile_channels(i, CHANNELS, COLS, BANDS)
        dx = rstd * (dy.to(tl.float32) * load_vector(norm_weight_ptr, cols, inside, ROWS))
        dx -= along * (x.to(tl.float32) - mean) + level
        if dstream_ptr is not None:
            dx += dstream.to(tl.float32)
        there = live & (i > 0)
        dy = load_tile(dy_ptr, dy_stride, i - 1, rows, there, CHANNELS, COLS, BANDS)
        x = load_tile(x_ptr, x_stride, i - 1, rows, there, CHANNELS, COLS, BANDS)
        if dstream_ptr is not None:
            dstream = load_tile(dstream_ptr, dstream_stride, i - 1, rows, there, CHANNELS, COLS, BANDS)
        e = tl.dot(du, load_down(packed_ptr, cols, inside, CHANNELS, H, G, 4 * G), input_precision="ieee")
        dx += rstd * tl.permute(e, (1, 0, 2))
        tl.store(dx_ptr + rows * CHANNELS + cols, dx, mask=inside & live)
