"""Triton kernels of attention.py, which has the formulas, the layout and the launchers.

A program has ROWS neighbouring tokens of the pack, whatever segments they are of, and one head. It walks in steps of
INNER over the tokens that any of its own sees (or, for keys, that see any of its own): without a mask as long as all
see all, masked by two bounds for each row elsewhere. Most tiles lie in one segment and need the mask for the last step
or for the diagonal only. Short segments share a tile: neither they nor the ends of long ones leave programs idle.
A WINDOW (0: none) makes the walk shorter, and needs the mask at its other edge too.

A head's d channels are a tile of COLS and, where d is just over COLS, one of REST: 80 is 64 + 16 and not 128. Such a
pair is a tuple here, of one tensor where REST is 0. Strides come in units of UNIT elements: UNIT 8 lets the compiler
see that 16 bytes of a row can be loaded at once. exp2_scale is scale * log2(e): exp(scale x) = 2^(exp2_scale x), and
lse is the base-2 logarithm of the sum of those.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kernels.logarithm import logarithm

LOWEST = tl.constexpr(-3e38)  # below every score, and finite: no row's maximum is ever -inf - -inf
LOG2E = tl.constexpr(1.4426950408889634)
SEARCH = tl.constexpr(32)  # segments that are compared with the rows at once

# One compiled kernel for all of them.
SIZES = [*(f"{x}_{stride}" for x in ("q", "k", "v", "do") for stride in ("token", "head")), "tokens", "segments"]


@triton.jit
def load(
    ptr: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    REST: tl.constexpr,
) -> tl.tuple:
    """Rows first to first + SIZE of a head's x [T, D], zero from row `limit` on: [SIZE, COLS] and [SIZE, REST]."""
    rows = tl.arange(0, SIZE)
    cols = tl.arange(0, COLS)
    at = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride
    inside = (rows < limit - first)[:, None]
    x: tl.tuple = (tl.load(at + cols[None, :], mask=inside & (cols < D)[None, :], other=0.0),)
    if REST > 0:
        cols = COLS + tl.arange(0, REST)
        x = (x[0], tl.load(at + cols[None, :], mask=inside & (cols < D)[None, :], other=0.0))
    return x


@triton.jit
def store(ptr: tl.tensor, stride: tl.tensor, first: tl.tensor, limit: tl.tensor, x: tl.tuple, D: tl.constexpr) -> None:
    """The counterpart of `load`."""
    rows = tl.arange(0, x[0].shape[0])
    cols = tl.arange(0, x[0].shape[1])
    at = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride
    inside = (rows < limit - first)[:, None]
    tl.store(at + cols[None, :], x[0], mask=inside & (cols < D)[None, :])
    if len(x) == 2:
        cols = x[0].shape[1] + tl.arange(0, x[1].shape[1])
        tl.store(at + cols[None, :], x[1], mask=inside & (cols < D)[None, :])


@triton.jit
def zeros(SIZE: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr) -> tl.tuple:
    x: tl.tuple = (tl.zeros([SIZE, COLS], dtype=tl.float32),)
    if REST > 0:
        x = (x[0], tl.zeros([SIZE, REST], dtype=tl.float32))
    return x


@triton.jit
def scaled(x: tl.tuple, by: tl.tensor) -> tl.tuple:
    y: tl.tuple = (x[0] * by,)
    if len(x) == 2:
        y = (y[0], x[1] * by)
    return y


@triton.jit
def products(x: tl.tuple, y: tl.tuple) -> tl.tensor:
    """x y^T over the channels, [rows of x, rows of y] fp32."""
    out = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    if len(x) == 2:
        out = tl.dot(x[1], tl.trans(y[1]), acc=out, input_precision="ieee")
    return out


@triton.jit
def add_products(total: tl.tuple, weights: tl.tensor, x: tl.tuple) -> tl.tuple:
    """total + weights x, with the weights rounded to x's dtype."""
    weights = weights.to(x[0].dtype)
    sums: tl.tuple = (tl.dot(weights, x[0], acc=total[0], input_precision="ieee"),)
    if len(x) == 2:
        sums = (sums[0], tl.dot(weights, x[1], acc=total[1], input_precision="ieee"))
    return sums


@triton.jit
def row_sums(x: tl.tuple, y: tl.tuple) -> tl.tensor:
    """sum over the channels of x y, [rows] fp32."""
    out = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), axis=1)
    if len(x) == 2:
        out += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), axis=1)
    return out


@triton.jit
def segment_of(
    cu_seqlens_ptr: tl.tensor, segments: tl.tensor, tokens: tl.tensor, row: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """First token of a row's segment, and the one after its last. Tokens that no segment covers are one more."""
    start, stop = row * 0, tokens
    for first in range(0, segments + 1, SEARCH):
        i = first + tl.arange(0, SEARCH)
        bound = tl.load(cu_seqlens_ptr + i, mask=i <= segments, other=tokens)
        start = tl.maximum(start, tl.max(tl.where(bound <= row, bound, 0)))
        stop = tl.minimum(stop, tl.min(tl.where(bound <= row, tokens, bound)))
    return start, stop


@triton.jit
def segment_of_each(
    cu_seqlens_ptr: tl.tensor, segments: tl.tensor, tokens: tl.tensor, rows: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The same for a tile of rows."""
    start, stop = rows * 0, rows * 0 + tokens
    for first in range(0, segments + 1, SEARCH):
        i = first + tl.arange(0, SEARCH)
        bound = tl.load(cu_seqlens_ptr + i, mask=i <= segments, other=tokens)[:, None]
        passed = bound <= rows[None, :]
        start = tl.maximum(start, tl.max(tl.where(passed, bound, 0), axis=0))
        stop = tl.minimum(stop, tl.min(tl.where(passed, tokens, bound), axis=0))
    return start, stop


@triton.jit
def segments_of_tile(
    cu_seqlens_ptr: tl.tensor, segments: tl.tensor, tokens: tl.tensor, rows: tl.tensor, first: tl.tensor,
    last: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Start and stop of each row's segment, searched for only where first and last row differ in it; the first row's
    start, the last row's stop, and whether they are of one segment."""
    begin, stop = segment_of(cu_seqlens_ptr, segments, tokens, first)
    last_begin, end = segment_of(cu_seqlens_ptr, segments, tokens, last)
    starts, stops = rows * 0 + begin, rows * 0 + stop
    if begin != last_begin:
        starts, stops = segment_of_each(cu_seqlens_ptr, segments, tokens, rows)
    return starts, stops, begin, end, begin == last_begin


@triton.jit
def visible(low: tl.tensor, high: tl.tensor, first: tl.tensor, INNER: tl.constexpr) -> tl.tensor:
    """[rows, INNER]: which of the tokens first to first + INNER are low to high of a row."""
    tokens = (first + tl.arange(0, INNER))[None, :]
    return (tokens >= low[:, None]) & (tokens < high[:, None])


@triton.jit
def keys_of(
    cu_seqlens_ptr: tl.tensor, segments: tl.tensor, tokens: tl.tensor, first: tl.tensor, ROWS: tl.constexpr,
    INNER: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """low and high of the keys that each query of a tile sees; of all of them; between which no mask is needed."""
    last = tl.minimum(first + ROWS, tokens) - 1
    rows = tl.minimum(first + tl.arange(0, ROWS), last)
    low, high, begin, end, together = segments_of_tile(cu_seqlens_ptr, segments, tokens, rows, first, last)
    all_see = end
    if CAUSAL:
        high, all_see, end = rows + 1, first + 1, last + 1
    clear_from = begin
    if WINDOW > 0:
        low, begin = tl.maximum(low, rows + (1 - WINDOW)), tl.maximum(begin, first + (1 - WINDOW))
        clear_from = begin + tl.cdiv(tl.maximum(last + (1 - WINDOW) - begin, 0), INNER) * INNER
        clear_from = tl.where(together, tl.minimum(clear_from, end), begin)
        all_see = tl.maximum(all_see, clear_from)
    masked_from = tl.where(together, clear_from + (all_see - clear_from) // INNER * INNER, begin)
    return low, high, begin, end, clear_from, masked_from


@triton.jit
def forward_steps(
    o: tl.tuple, top: tl.tensor, total: tl.tensor, q: tl.tuple, k_ptr: tl.tensor, v_ptr: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor, begin: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor,
    exp2_scale: tl.tensor,
    D: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr, INNER: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor, tl.tensor]:  # fmt: skip
    """Online softmax over the keys begin to end: o and `total` are sums with the weights 2^(score - top)."""
    for first in range(begin, end, INNER):
        k = load(k_ptr, k_stride, first, end, INNER, D, COLS, REST)
        scores = products(q, k)
        if MASKED:
            scores = tl.where(visible(low, high, first, INNER), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * exp2_scale)
        weights = tl.exp2(scores * exp2_scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load(v_ptr, v_stride, first, end, INNER, D, COLS, REST)
        o = add_products(scaled(o, shrink[:, None]), weights, v)
        top = new_top
    return o, top, total


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, cu_seqlens_ptr: tl.tensor, o_ptr: tl.tensor,
    lse_ptr: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor, k_head: tl.tensor,
    v_token: tl.tensor, v_head: tl.tensor, tokens: tl.tensor, segments: tl.tensor, exp2_scale: tl.tensor,
    GROUP: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
) -> None:  # fmt: skip
    """One program: the queries of a tile, over the keys that they see."""
    head = tl.program_id(1).to(tl.int64)  # heads may be far apart
    first = tl.program_id(0) * ROWS
    low, high, begin, end, clear_from, masked_from = keys_of(
        cu_seqlens_ptr, segments, tokens, first, ROWS, INNER, CAUSAL, WINDOW
    )
    q = load(q_ptr + head * q_head * UNIT, q_token * UNIT, first, tokens, ROWS, D, COLS, REST)
    k_ptr += head // GROUP * k_head * UNIT
    v_ptr += head // GROUP * v_head * UNIT
    o = zeros(ROWS, COLS, REST)
    top = tl.full([ROWS], LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if WINDOW > 0:
        o, top, total = forward_steps(
            o, top, total, q, k_ptr, v_ptr, k_token * UNIT, v_token * UNIT, begin, clear_from, low, high, exp2_scale,
            D, COLS, REST, INNER, True,
        )  # fmt: skip
    o, top, total = forward_steps(
        o, top, total, q, k_ptr, v_ptr, k_token * UNIT, v_token * UNIT, clear_from, masked_from, low, high, exp2_scale,
        D, COLS, REST, INNER, False,
    )  # fmt: skip
    o, top, total = forward_steps(
        o, top, total, q, k_ptr, v_ptr, k_token * UNIT, v_token * UNIT, masked_from, end, low, high, exp2_scale,
        D, COLS, REST, INNER, True,
    )  # fmt: skip
    store(o_ptr + head * D, tl.num_programs(1) * D, first, tokens, scaled(o, 1.0 / total[:, None]), D)
    rows = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + head * tokens + rows, top + logarithm(total) * LOG2E, mask=rows < tokens)


@triton.jit
def dq_steps(
    dq: tl.tuple, q: tl.tuple, do: tl.tuple, lse: tl.tensor, delta: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor, begin: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor,
    exp2_scale: tl.tensor,
    D: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr, INNER: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    for first in range(begin, end, INNER):
        k = load(k_ptr, k_stride, first, end, INNER, D, COLS, REST)
        weights = tl.exp2(products(q, k) * exp2_scale - lse[:, None])
        if MASKED:
            weights = tl.where(visible(low, high, first, INNER), weights, 0.0)
        v = load(v_ptr, v_stride, first, end, INNER, D, COLS, REST)
        dq = add_products(dq, weights * (products(do, v) - delta[:, None]), k)
    return dq


@triton.jit(do_not_specialize=SIZES)
def attention_dq_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, do_ptr: tl.tensor, o_ptr: tl.tensor, lse_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor, dq_ptr: tl.tensor, delta_ptr: tl.tensor, q_token: tl.tensor, q_head: tl.tensor,
    k_token: tl.tensor, k_head: tl.tensor, v_token: tl.tensor, v_head: tl.tensor, do_token: tl.tensor,
    do_head: tl.tensor, tokens: tl.tensor, segments: tl.tensor, scale: tl.tensor, exp2_scale: tl.tensor,
    GROUP: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
) -> None:  # fmt: skip
    """One program: the queries of a tile, over the keys that they see; also their delta."""
    head = tl.program_id(1).to(tl.int64)  # heads may be far apart
    first = tl.program_id(0) * ROWS
    low, high, begin, end, clear_from, masked_from = keys_of(
        cu_seqlens_ptr, segments, tokens, first, ROWS, INNER, CAUSAL, WINDOW
    )
    o_stride = tl.num_programs(1) * D
    q = load(q_ptr + head * q_head * UNIT, q_token * UNIT, first, tokens, ROWS, D, COLS, REST)
    do = load(do_ptr + head * do_head * UNIT, do_token * UNIT, first, tokens, ROWS, D, COLS, REST)
    delta = row_sums(do, load(o_ptr + head * D, o_stride, first, tokens, ROWS, D, COLS, REST))
    rows = first + tl.arange(0, ROWS)
    at = head * tokens + rows
    tl.store(delta_ptr + at, delta, mask=rows < tokens)
    lse = tl.load(lse_ptr + at, mask=rows < tokens, other=0.0)
    k_ptr += head // GROUP * k_head * UNIT
    v_ptr += head // GROUP * v_head * UNIT
    dq = zeros(ROWS, COLS, REST)
    if WINDOW > 0:
        dq = dq_steps(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_token * UNIT, v_token * UNIT, begin, clear_from, low, high,
            exp2_scale, D, COLS, REST, INNER, True,
        )  # fmt: skip
    dq = dq_steps(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_token * UNIT, v_token * UNIT, clear_from, masked_from, low, high,
        exp2_scale, D, COLS, REST, INNER, False,
    )  # fmt: skip
    dq = dq_steps(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_token * UNIT, v_token * UNIT, masked_from, end, low, high, exp2_scale,
        D, COLS, REST, INNER, True,
    )  # fmt: skip
    of_scores = tl.where(high - low > 1, scale, 0.0)[:, None]  # a query's only score has no gradient, to the bit
    store(dq_ptr + head * D, o_stride, first, tokens, scaled(dq, of_scores), D)


@triton.jit
def dkdv_steps(
    dk: tl.tuple, dv: tl.tuple, k: tl.tuple, v: tl.tuple, q_ptr: tl.tensor, do_ptr: tl.tensor, lse_ptr: tl.tensor,
    delta_ptr: tl.tensor, q_head: tl.tensor, do_head: tl.tensor, q_token: tl.tensor, do_token: tl.tensor,
    tokens: tl.tensor, begin: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor, exp2_scale: tl.tensor,
    GROUP: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr, INNER: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:  # fmt: skip
    """The queries begin to end of each head of the group. Those from `end` on, read as zeros, add nothing."""
    for n in range(tl.cdiv(end - begin, INNER) * GROUP):
        head = n % GROUP
        first = begin + n // GROUP * INNER
        queries = first + tl.arange(0, INNER)
        q = load(q_ptr + head * q_head, q_token, first, end, INNER, D, COLS, REST)
        lse = tl.load(lse_ptr + head * tokens + queries, mask=queries < end, other=0.0)
        weights = tl.exp2(products(k, q) * exp2_scale - lse[None, :])
        if MASKED:
            weights = tl.where(visible(low, high, first, INNER), weights, 0.0)
        do = load(do_ptr + head * do_head, do_token, first, end, INNER, D, COLS, REST)
        dv = add_products(dv, weights, do)
        delta = tl.load(delta_ptr + head * tokens + queries, mask=queries < end, other=0.0)
        dk = add_products(dk, weights * (products(v, do) - delta[None, :]), q)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def attention_dkdv_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, do_ptr: tl.tensor, lse_ptr: tl.tensor, delta_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor, dk_ptr: tl.tensor, dv_ptr: tl.tensor, q_token: tl.tensor, q_head: tl.tensor,
    k_token: tl.tensor, k_head: tl.tensor, v_token: tl.tensor, v_head: tl.tensor, do_token: tl.tensor,
    do_head: tl.tensor, tokens: tl.tensor, segments: tl.tensor, scale: tl.tensor, exp2_scale: tl.tensor,
    GROUP: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
) -> None:  # fmt: skip
    """One program: the keys of a tile, over the queries that see them, one query head of their group after another."""
    kv_head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, tokens) - 1
    rows = tl.minimum(first + tl.arange(0, ROWS), last)
    low, high, begin, end, together = segments_of_tile(cu_seqlens_ptr, segments, tokens, rows, first, last)
    scores = high - low
    if WINDOW > 0:
        scores = tl.minimum(scores, WINDOW)
    of_scores = tl.where(scores > 1, scale, 0.0)[:, None]  # a query's only score has no gradient, to the bit
    all_see = begin
    if CAUSAL:
        low, all_see, begin = rows, last, first
    if WINDOW > 0:
        high, end = tl.minimum(high, rows + WINDOW), tl.minimum(end, last + WINDOW)
    masked_to = tl.where(together, tl.minimum(end, begin + tl.cdiv(all_see - begin, INNER) * INNER), end)
    clear_to = end
    if WINDOW > 0:
        clear = tl.maximum(first + WINDOW - masked_to, 0) // INNER * INNER
        clear_to = tl.where(first + WINDOW < end, masked_to + clear, end)
    k = load(k_ptr + kv_head * k_head * UNIT, k_token * UNIT, first, tokens, ROWS, D, COLS, REST)
    v = load(v_ptr + kv_head * v_head * UNIT, v_token * UNIT, first, tokens, ROWS, D, COLS, REST)
    dk = zeros(ROWS, COLS, REST)
    dv = zeros(ROWS, COLS, REST)
    head = kv_head * GROUP
    q_far, do_far = q_head.to(tl.int64) * UNIT, do_head.to(tl.int64) * UNIT
    q_ptr += head * q_far
    do_ptr += head * do_far
    lse_ptr += head * tokens
    delta_ptr += head * tokens
    dk, dv = dkdv_steps(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_far, do_far, q_token * UNIT, do_token * UNIT,
        tokens, begin, masked_to, low, high, exp2_scale, GROUP, D, COLS, REST, INNER, True,
    )  # fmt: skip
    dk, dv = dkdv_steps(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_far, do_far, q_token * UNIT, do_token * UNIT,
        tokens, masked_to, clear_to, low, high, exp2_scale, GROUP, D, COLS, REST, INNER, False,
    )  # fmt: skip
    if WINDOW > 0:
        dk, dv = dkdv_steps(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_far, do_far, q_token * UNIT, do_token * UNIT,
            tokens, clear_to, end, low, high, exp2_scale, GROUP, D, COLS, REST, INNER, True,
        )  # fmt: skip
    stride = tl.num_programs(1) * D
    store(dk_ptr + kv_head * D, stride, first, tokens, scaled(dk, of_scores), D)
    store(dv_ptr + kv_head * D, stride, first, tokens, dv, D)
