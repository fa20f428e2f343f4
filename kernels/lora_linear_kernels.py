"""Triton kernels of lora_linear.py, which has the formulas, the layout and the launchers.

ADAPTERS: n of the group; RANK: r; PADDED: r as a power of two and at least 16 (tl.dot's smallest). PRECISION: tl.dot's
input precision. Adapter i has the columns i r to (i + 1) r of a code [T, n r] and those rows of A [n r, K], and drops x
by the mask of site + i. An absent seed means no dropout.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kernels.dropout import keep


@triton.jit(do_not_specialize=["site", "limit"])
def lora_down_kernel(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """One program: drop_i(x) A_i^T of ROWS tokens and all i over COLS channels, into partial [parts, T, n r]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < tokens
    at = rows.to(tl.int64)[:, None]
    rank = tl.arange(0, PADDED)
    seed = tl.load(seed_ptr)
    total = (tl.zeros([ROWS, PADDED], dtype=tl.float32),) * ADAPTERS
    first = tl.program_id(1) * COLS
    for start in range(first, tl.minimum(first + COLS, channels), INNER):
        cols = start + tl.arange(0, INNER)
        inside = cols < channels
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        summed = ()
        for i in tl.static_range(ADAPTERS):
            a_offset = (i * RANK + rank)[None, :] * channels + cols[:, None]
            a = tl.load(a_ptr + a_offset, mask=(rank < RANK)[None, :] & inside[:, None], other=0.0)
            kept = tl.where(keep(seed, site + i, at * channels + cols[None, :], limit), x, 0.0)
            summed += (tl.dot(kept, a, acc=total[i], input_precision=PRECISION),)  # type: ignore[assignment]
        total = summed
    out = partial_ptr + (tl.program_id(1).to(tl.int64) * tokens + at) * (ADAPTERS * RANK) + rank[None, :]
    for i in tl.static_range(ADAPTERS):
        tl.store(out + i * RANK, total[i] * kept_scale, mask=live[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["site", "limit"])
def lora_update_kernel(
    dx_ptr: tl.tensor,
    g_ptr: tl.tensor,
    a_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    dx_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """One program: a tile of dx += sum_i drop_i(g_i A_i). INNER: step over the rank."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    at = rows.to(tl.int64)[:, None]
    seed = tl.load(seed_ptr)
    update = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i in range(ADAPTERS):
        product = tl.zeros([ROWS, COLS], dtype=tl.float32)
        for start in range(0, PADDED, INNER):
            rank = start + tl.arange(0, INNER)
            g_offset = at * (ADAPTERS * RANK) + (i * RANK + rank)[None, :]
            g = tl.load(g_ptr + g_offset, mask=(rows < tokens)[:, None] & (rank < RANK)[None, :], other=0.0)
            a_offset = (i * RANK + rank)[:, None] * channels + cols[None, :]
            a = tl.load(a_ptr + a_offset, mask=(rank < RANK)[:, None] & (cols < channels)[None, :], other=0.0)
            product = tl.dot(g, a, acc=product, input_precision=PRECISION)
        update += tl.where(keep(seed, site + i, at * channels + cols[None, :], limit), product, 0.0)
    inside = (rows < tokens)[:, None] & (cols < channels)[None, :]
    here = dx_ptr + at * dx_stride + cols[None, :]
    tl.store(here, tl.load(here, mask=inside, other=0.0).to(tl.float32) + kept_scale * update, mask=inside)


@triton.jit(do_not_specialize=["site", "limit"])
def lora_outer_kernel(
    code_ptr: tl.tensor,
    x_ptr: tl.tensor,
    seed_ptr: tl.tensor | None,
    partial_ptr: tl.tensor,
    code_stride: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    site: tl.tensor,
    limit: tl.tensor,
    kept_scale: tl.tensor,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: code_i^T drop_i(x) of COLS channels and all i over CHUNK tokens, into partial [chunks, n r, K]."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rank = tl.arange(0, PADDED)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    total = (tl.zeros([PADDED, COLS], dtype=tl.float32),) * ADAPTERS
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < tokens
        at = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=live[:, None] & (cols < channels)[None, :], other=0.0)
        summed = ()
        for i in tl.static_range(ADAPTERS):
            code_offset = at * code_stride + (i * RANK + rank)[None, :]
            code = tl.load(code_ptr + code_offset, mask=live[:, None] & (rank < RANK)[None, :], other=0.0)
            kept = x
            if seed_ptr is not None:
                kept = tl.where(keep(seed, site + i, at * channels + cols[None, :], limit), x, 0.0)
            summed += (tl.dot(tl.trans(code), kept, acc=total[i], input_precision=PRECISION),)  # type: ignore[assignment]
        total = summed
    mask = (rank < RANK)[:, None] & (cols < channels)[None, :]
    out = partial_ptr + (tl.program_id(1).to(tl.int64) * (ADAPTERS * RANK) + rank[:, None]) * channels + cols[None, :]
    for i in tl.static_range(ADAPTERS):
        tl.store(out + i * RANK * channels, total[i] * kept_scale, mask=mask)
