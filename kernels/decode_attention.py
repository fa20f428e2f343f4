"""Attention of one new token a sequence over the keys and values that are cached, which get the new ones in passing.

    keys[b, n] = k[b], values[b, n] = v[b], n = lengths[b]
    out[b, h] = sum_(s <= n) p[s] values[b, s, g],  p = softmax_s(scale q[b, h] . keys[b, s, g]),  g = h // (H / G)
    where there is a window, s > n - window

q, out [B, H, d], k, v [B, G, d], keys, values [B, P, G, d], lengths int64 [B] on the device: the host need not know
them, so a step of decoding can be a CUDA graph. One launch in place of two scattered writes, a mask and a
padded attention, each in every layer of a step.

A program has one head of one sequence; softmax is taken online over tiles of ROWS places, in fp32. Bytes: the cache's
first n places, or those of the window, once (by every query head of their group, from the L2 cache after the first),
q, k, v, out once. Prediction: 2 to 4 us at 256 places; one sequence of thousands leaves most of a large card idle,
since its places are not divided among programs.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import choose, launch, primitive, run, unit_stride

WIDEST = 128  # channels of a head
LOWEST = tl.constexpr(-3e38)  # below every score, and finite


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch, the cache written in place too."""
    rows = torch.arange(q.shape[0], device=q.device)
    keys[rows, lengths] = k
    values[rows, lengths] = v
    behind = lengths[:, None] - torch.arange(keys.shape[1], device=q.device)  # [B, P], how far behind the new token
    seen = (behind >= 0) & (behind < (keys.shape[1] if window is None else window))
    out = F.scaled_dot_product_attention(
        q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen[:, None, None], scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[:, :, 0]


@triton.jit
def decode_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    out_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    places: tl.tensor,
    groups: tl.tensor,
    exp2_scale: tl.tensor,
    window: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    head, row = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    group = head // GROUP
    length = tl.load(lengths_ptr + row)
    cols = tl.arange(0, COLS)
    inside = cols < D
    q = tl.load(q_ptr + row * q_row + head * q_head + cols, mask=inside, other=0.0).to(tl.float32) * exp2_scale
    new_k = tl.load(k_ptr + row * k_row + group * k_head + cols, mask=inside, other=0.0)
    new_v = tl.load(v_ptr + row * v_row + group * v_head + cols, mask=inside, other=0.0)
    cached = (row * places * groups + group) * D + cols  # of place 0
    if head % GROUP == 0:  # one program a group; nobody reads this place
        at = cached + length * groups * D
        tl.store(keys_ptr + at, new_k, mask=inside & (length < places))
        tl.store(values_ptr + at, new_v, mask=inside & (length < places))
    largest = tl.sum(q * new_k.to(tl.float32))
    total = 1.0
    out = new_v.to(tl.float32)
    for start in range(tl.maximum(length + 1 - window, 0), length, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = cached[None, :] + (rows * groups * D)[:, None]
        there = (rows < length)[:, None] & inside[None, :]
        tile = tl.load(keys_ptr + at, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(rows < length, tl.sum(tile * q[None, :], axis=1), LOWEST)
        top = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp2(largest - top)
        p = tl.exp2(scores - top)
        tile = tl.load(values_ptr + at, mask=there, other=0.0).to(tl.float32)
        out = out * shrink + tl.sum(tile * p[:, None], axis=0)
        total = total * shrink + tl.sum(p, axis=0)
        largest = top
    target = out_ptr + (row * tl.num_programs(0) + head) * D + cols
    tl.store(target, (out / total).to(out_ptr.dtype.element_ty), mask=inside)


def _outputs(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@primitive(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, float scale, "
    "int window) -> Tensor",
    fake=_outputs,
)
def decode_attention_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    """q, k, v with unit last stride, keys, values, lengths contiguous; one dtype but for lengths -> out [B, H, d]."""
    out = _outputs(q)
    (batch, heads, head_dim), (_, places, groups, _) = q.shape, keys.shape
    config = launch("decode_attention", head_dim + (WIDEST if q.dtype == torch.float32 else 0), q)
    run(
        decode_attention_kernel, (heads, batch), config,
        q, k, v, keys, values, lengths, out, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], places, groups,
        scale * math.log2(math.e), window, GROUP=heads // groups, D=head_dim,
    )  # fmt: skip
    return out


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Writes k and v behind the first lengths[b] places of each sequence's cache and attends to all of them.

    Shapes at the top; q, k, v, lengths of any strides, keys and values contiguous and written in place, d <= 128, scale
    d^-0.5 by default. lengths[b] < P is the caller's to see to. window: only the last so many places are seen, the new
    one among them. No gradients.
    Raises ValueError where shapes or dtypes do not fit, for a window below 1, or where a gradient is asked for.
    """
    _check(q, k, v, keys, values, lengths)
    if window is not None and window < 1:
        raise ValueError(f"decode_attention takes a window of at least 1 place, got {window}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose("decode_attention", q, ("triton", "reference")) == "reference":
        return decode_attention_reference(q, k, v, keys, values, lengths, scale, window)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    return decode_attention_(q, k, v, keys, values, lengths.contiguous(), scale, window or keys.shape[1])


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v, keys, values, lengths)]
    fits = (q.ndim, k.ndim, keys.ndim) == (3, 3, 4) and k.shape == v.shape and keys.shape == values.shape
    if fits:
        (batch, heads, head_dim), (_, _, groups, _) = q.shape, keys.shape
        fits = k.shape == (batch, groups, head_dim) and lengths.shape == (batch,) and heads % groups == 0
        fits = fits and keys.shape[0] == batch and keys.shape[3] == head_dim <= WIDEST
    if not fits:
        raise ValueError(
            f"decode_attention takes q [B, H, d], k, v [B, G, d], keys, values [B, P, G, d], lengths [B], d at most "
            f"{WIDEST}, H a multiple of G; got {', '.join(map(str, shapes))}"
        )
    if len({x.dtype for x in (q, k, v, keys, values)}) > 1 or lengths.dtype != torch.int64:
        raise ValueError("decode_attention takes q, k, v, keys, values of one dtype and lengths in int64")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("decode_attention takes contiguous keys and values")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("decode_attention has no gradients; call it under torch.no_grad()")
