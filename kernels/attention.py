"""Softmax attention within the segments of a pack (no padding; a token sees its own segment only).

    o[t, h] = sum_s softmax_s(scale q[t, h] . k[s, g]) v[s, g]
    s in t's segment, s <= t where causal; g = h // (H / G)

q, o [T, H, d], k, v [T, G, d] (grouped-query: H a multiple of G), segments cu_seqlens[i] .. cu_seqlens[i + 1].

16-bit tensors on a GPU from sm_80 on take torch's varlen attention (FlashAttention 2: no score matrix, saves o and one
fp32 a row and head; it refuses older cards). All others take scaled_dot_product_attention, one call for each run of
neighbours of one length: a single call for a vision tower, whose segments are all alike. For the short, mixed segments
of a text pack that loop was measured on a CPU (30 segments of 40 to 100 tokens, 4 heads of 16 or 32, forward and
backward): it is faster than padding them into one batch, and 15 times faster than one call with a block-diagonal mask.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import record

OLDEST_FLASH = (8, 0)  # the compute capability that FlashAttention 2 begins with


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, causal: bool, scale: float | None = None
) -> Tensor:
    """The formula with one block-diagonal score matrix [H, T, T], in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    segment = torch.bucketize(torch.arange(q.shape[0], device=q.device), cu_seqlens, right=True)
    hidden = segment[:, None] != segment
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


def _segment_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None) -> Tensor:
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"cu_seqlens covers {sum(lengths)} tokens, q has {q.shape[0]}")
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    parts = (torch.split(x, [length * count for length, count in runs]) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    outs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        # [count, H or G, length, d]
        queries, keys, values = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=scale, enable_gqa=grouped)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@cache
def _varlen_attn() -> tuple[Any, bool]:
    """torch's varlen attention, and whether it knows `enable_gqa`.

    torch 2.11 does not; from 2.12 on the flag must be set where q and k differ in heads. What else is passed below is
    the same in 2.11 to 2.13.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None
) -> Tensor:
    attend, takes_gqa = _varlen_attn()
    options = {}
    if q.shape[1] != k.shape[1] and takes_gqa:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    window = (-1, 0) if causal else (-1, -1)
    q, k, v = (x.contiguous() for x in (q, k, v))
    out: Tensor = attend(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **options
    )
    return out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention of q [T, H, d] over k, v [T, G, d] within segments -> [T, H, d].

    cu_seqlens int32 [S + 1] on the tensors' device, from 0 to T; segments may be empty. max_seqlen: the longest one (or
    any bound on it), on the host. scale: 1 / sqrt(d) by default.
    Raises ValueError where shapes or dtypes do not fit.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "attention takes q [T, H, d] and k, v [T, G, d] with H a multiple of G; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if not q.shape[0]:
        return q.clone()
    implementation, reason = _implementation(q)
    record("attention", implementation, reason)
    if implementation == "flash":
        return _flash(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    return _segment_loop(q, k, v, cu_seqlens, causal, scale)


def _implementation(q: Tensor) -> tuple[str, str]:
    """-> ("flash" or "sdpa", why)."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"{q.dtype} tensor on {q.device.type}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if (major, minor) < OLDEST_FLASH:
        return "sdpa", f"FlashAttention 2 refuses sm_{major}{minor}"
    return "flash", "16-bit CUDA tensor: torch.nn.attention.varlen"
