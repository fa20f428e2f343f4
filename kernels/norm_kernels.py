"""Triton kernels of norm.py, which has the formulas and the launchers.

Forward and backward hold whole rows in registers: a row is a few tiles [ROWS, COLS] of 8 elements a thread, which is
one 16-byte load of a 16-bit tensor. So a width that is no power of two wastes a part of its last tile only. All loads
of rows are issued before the first is used, and before anything is stored: a later one would wait for the store.

CHANNELS is a constant, so that only a ragged last tile has masks. ALIGN divides it and all row strides: rows of an odd
multiple of 2 or 4 channels are loaded in pieces of that many. No bias, or LAYER_NORM false, means RMSNorm.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_program(tokens: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """[ROWS, 1]. Past the end the last row is repeated: the same values are stored again, and no mask is needed."""
    return tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tokens - 1)


@triton.jit
def columns(i: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """Of tile i, [1, COLS]."""
    return i * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def load_rows(
    ptr: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tl.tuple:
    """The tiles of `rows`, zero past the last channel. ALIGN divides the stride; 0 gives every row the same vector."""
    start = ptr + rows.to(tl.int64) * (stride // ALIGN) * ALIGN
    tiles = tl.tuple([])
    for i in tl.static_range((CHANNELS + COLS - 1) // COLS):
        cols = columns(i, COLS)
        if (i + 1) * COLS <= CHANNELS:
            tiles += (tl.load(start + cols),)
        else:
            tiles += (tl.load(start + cols, mask=cols < CHANNELS, other=0.0),)
    return tiles


@triton.jit
def store_tile(
    ptr: tl.tensor, value: tl.tensor, i: tl.constexpr, rows: tl.tensor, CHANNELS: tl.constexpr, COLS: tl.constexpr
) -> None:
    """To tile i of `rows` of a contiguous tensor."""
    cols = columns(i, COLS)
    at = ptr + rows.to(tl.int64) * CHANNELS + cols
    if (i + 1) * COLS <= CHANNELS:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=cols < CHANNELS)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor | None,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    stream_ptr: tl.tensor,
    y_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    tokens: tl.tensor,
    eps: tl.tensor,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: ROWS whole rows."""
    TILES: tl.constexpr = (CHANNELS + COLS - 1) // COLS
    rows = rows_of_program(tokens, ROWS)
    x = load_rows(x_ptr, x_stride, rows, CHANNELS, COLS, ALIGN)
    if delta_ptr is not None:
        delta = load_rows(delta_ptr, delta_stride, rows, CHANNELS, COLS, ALIGN)
    if bias_ptr is None:  # arrives with the rows
        weight = load_rows(weight_ptr, 0, rows, CHANNELS, COLS, ALIGN)

    stream = tl.tuple([])
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in tl.static_range(TILES):
        value = x[i]
        if delta_ptr is not None:
            value = (value.to(tl.float32) + delta[i].to(tl.float32)).to(value.dtype)
            store_tile(stream_ptr, value, i, rows, CHANNELS, COLS)
        stream += (value.to(tl.float32),)
        total += stream[i]
    if bias_ptr is None:
        mean = 0.0
        at = statistics_ptr + rows
    else:
        mean = tl.sum(total, axis=1, keep_dims=True) / CHANNELS
        at = statistics_ptr + 2 * rows
        tl.store(at + 1, mean)

    centred = tl.tuple([])
    square = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in tl.static_range(TILES):
        value = stream[i] - mean
        if bias_ptr is not None and (i + 1) * COLS > CHANNELS:
            value = tl.where(columns(i, COLS) < CHANNELS, value, 0.0)
        centred += (value,)
        square += value * value
    rstd = 1.0 / tl.sqrt_rn(tl.sum(square, axis=1, keep_dims=True) / CHANNELS + eps)
    tl.store(at, rstd)

    if bias_ptr is not None:  # two vectors, in fp32 mostly: held from the start they would halve the rows under way
        weight = load_rows(weight_ptr, 0, rows, CHANNELS, COLS, ALIGN)
        bias = load_rows(bias_ptr, 0, rows, CHANNELS, COLS, ALIGN)
    for i in tl.static_range(TILES):
        xhat = centred[i] * rstd
        if CAST_FIRST:
            xhat = xhat.to(x[i].dtype).to(tl.float32)
        y = xhat * weight[i].to(tl.float32)
        if bias_ptr is not None:
            y += bias[i].to(tl.float32)
        store_tile(y_ptr, y, i, rows, CHANNELS, COLS)


@triton.jit(do_not_specialize=["tokens"])
def norm_backward_kernel(
    dy_ptr: tl.tensor,
    dy2_ptr: tl.tensor | None,
    dstream_ptr: tl.tensor | None,
    stream_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dy_stride: tl.tensor,
    dy2_stride: tl.tensor,
    dstream_stride: tl.tensor,
    stream_stride: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """One program: ROWS whole rows."""
    TILES: tl.constexpr = (CHANNELS + COLS - 1) // COLS
    rows = rows_of_program(tokens, ROWS)
    mean, rstd = load_statistics(statistics_ptr, rows, LAYER_NORM)
    stream = load_rows(stream_ptr, stream_stride, rows, CHANNELS, COLS, ALIGN)
    dy = load_rows(dy_ptr, dy_stride, rows, CHANNELS, COLS, ALIGN)
    if dy2_ptr is not None:
        dy2 = load_rows(dy2_ptr, dy2_stride, rows, CHANNELS, COLS, ALIGN)
    if dstream_ptr is not None:
        dstream = load_rows(dstream_ptr, dstream_stride, rows, CHANNELS, COLS, ALIGN)
    weight = load_rows(weight_ptr, 0, rows, CHANNELS, COLS, ALIGN)

    xhat, g = tl.tuple([]), tl.tuple([])
    along = tl.zeros([ROWS, COLS], dtype=tl.float32)  # of g * xhat
    level = tl.zeros([ROWS, COLS], dtype=tl.float32)  # of g
    for i in tl.static_range(TILES):
        dbranches = dy[i].to(tl.float32)
        if dy2_ptr is not None:
            dbranches += dy2[i].to(tl.float32)
        xhat += ((stream[i].to(tl.float32) - mean) * rstd,)
        g += (dbranches * weight[i].to(tl.float32),)
        along += g[i] * xhat[i]
        level += g[i]
    along_mean = tl.sum(along, axis=1, keep_dims=True) / CHANNELS
    level_mean = tl.sum(level, axis=1, keep_dims=True) / CHANNELS if LAYER_NORM else 0.0

    for i in tl.static_range(TILES):
        dx = rstd * (g[i] - xhat[i] * along_mean - level_mean)
        if dstream_ptr is not None:
            dx += dstream[i].to(tl.float32)
        store_tile(dx_ptr, dx, i, rows, CHANNELS, COLS)


@triton.jit
def load_statistics(ptr: tl.tensor, rows: tl.tensor, LAYER_NORM: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Mean (RMSNorm: 0) and rstd of `rows`."""
    if LAYER_NORM:
        rstd = tl.load(ptr + 2 * rows)
        mean = tl.load(ptr + 2 * rows + 1)
    else:
        rstd = tl.load(ptr + rows)
        mean = 0.0
    return mean, rstd


@triton.jit(do_not_specialize=["tokens"])
def norm_daffine_kernel(
    dy_ptr: tl.tensor,
    dy2_ptr: tl.tensor | None,
    stream_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    dy_stride: tl.tensor,
    dy2_stride: tl.tensor,
    stream_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    LAYER_NORM: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: COLS channels summed over CHUNK tokens, into partial [chunks, 1 or 2, D]."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    dweight = tl.zeros([ROWS, COLS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = tl.program_id(1) * CHUNK + start + tl.arange(0, ROWS)[:, None]
        inside = (rows < tokens) & (cols < channels)
        rows = tl.minimum(rows, tokens - 1)  # whose statistics exist; the rows past the end are zeros
        at = rows.to(tl.int64)
        stream = tl.load(stream_ptr + at * stream_stride + cols, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
        if dy2_ptr is not None:
            dy += tl.load(dy2_ptr + at * dy2_stride + cols, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = load_statistics(statistics_ptr, rows, LAYER_NORM)
        xhat = (stream.to(tl.float32) - mean) * rstd
        if CAST_FIRST:
            xhat = xhat.to(stream.dtype).to(tl.float32)
        dweight += dy * xhat
        dbias += dy
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * (2 if LAYER_NORM else 1) * channels + cols
    tl.store(partial, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < channels)
    if LAYER_NORM:
        tl.store(partial + channels, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < channels)
