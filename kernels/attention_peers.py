"""Attention over the segments of a pack by torch, flash-attn and xformers, behind one signature: that of `Attend`.

flash        torch.nn.attention.varlen, FlashAttention 2: 16 bits, from sm_80 on, head dims that are multiples of 8
flash_attn   the package flash-attn: the same, and with its own kernels
xformers     its block-diagonal masks: torch's FlashAttention 2 or CUTLASS kernels, so fp32 and older cards too
sdpa         scaled_dot_product_attention, one call for each run of neighbours of one length: anything, anywhere, but
             it waits for the lengths. A vision tower's segments are all alike: one call. For the short, mixed segments
             of a text pack the loop was measured on a CPU (30 segments of 40 to 100 tokens, 4 heads of 16 or 32,
             forward and backward): it is faster than padding them into one batch, and 15 times faster than one call
             with a block-diagonal mask. Where a window hides something of a segment, the mask of one length is
             written out

A window w comes as theirs, (w - 1, 0): tokens before and behind. What xformers has for it is not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """q [T, H, d], k, v [T, G, d], cu_seqlens int32 [S + 1] on their device -> o [T, H, d]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
        window: int | None = None, /,
    ) -> Tensor: ...  # fmt: skip


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"cu_seqlens covers {sum(lengths)} tokens, q has {q.shape[0]}")
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    parts = (torch.split(x, [length * count for length, count in runs]) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    outs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        # [count, H or G, length, d]
        queries, keys, values = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        mask = None if window is None or length <= window else _band(length, window, q.device)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length]: which keys (columns) a query sees, itself and window - 1 before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """k or v [T, G, d] for callees that take one head of it for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _aligned(x: Tensor) -> Tensor:
    """`x` itself where FlashAttention's 16-byte loads can read it, else a contiguous copy."""
    strided = x.stride(-1) == 1 and not any(n % 8 for n in (*x.stride()[:2], x.storage_offset()))
    return x if strided else x.contiguous()


@cache
def _varlen_attn() -> tuple[Any, bool]:
    """torch's varlen attention, and whether it knows `enable_gqa`.

    torch 2.11 does not; from 2.12 on the flag must be set where q and k differ in heads. What else is passed below is
    the same in 2.11 to 2.13.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _window(causal: bool, window: int | None) -> tuple[int, int]:
    """Tokens that are seen before and behind one, -1 for all, as FlashAttention's interface has it."""
    return (-1 if window is None else window - 1, 0 if causal else -1)


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    attend, takes_gqa = _varlen_attn()
    options = {"enable_gqa": q.shape[1] != k.shape[1]} if takes_gqa else {}
    if not takes_gqa:
        k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    q, k, v = (_aligned(x) for x in (q, k, v))
    out: Tensor = attend(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=_window(causal, window),
        **options,
    )  # fmt: skip
    return out


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    from flash_attn import flash_attn_varlen_func

    options = {} if window is None else {"window_size": _window(causal, window)}  # from 2.3 on
    q, k, v = (_aligned(x) for x in (q, k, v))
    out: Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal, **options
    )
    return out


def xformers(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Its masks are made of host lengths, but read the tensor of bounds only: the lists may stay empty (0.0.35).

    A window never comes here: see `windowless`.
    """
    from xformers.ops import fmha

    bounds = fmha.attn_bias._SeqLenInfo(
        seqstart=cu_seqlens, max_seqlen=min(max_seqlen, q.shape[0]), min_seqlen=0, seqstart_py=[]
    )
    mask = fmha.attn_bias.BlockDiagonalCausalMask if causal else fmha.attn_bias.BlockDiagonalMask
    q, k, v = (_aligned(_repeated(x, q.shape[1]))[None] for x in (q, k, v))
    out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=mask(bounds, bounds), scale=scale)
    return out[0]


PEERS: dict[str, Attend] = {"flash": flash, "flash_attn": flash_attn, "xformers": xformers, "sdpa": sdpa}
MODULES = {"flash": "torch.nn.attention.varlen", "flash_attn": "flash_attn", "xformers": "xformers.ops"}


def missing(peer: str) -> str:
    """Why one of PEERS cannot run on this machine; empty where it can."""
    if peer == "sdpa":
        return ""
    return _not_importable(MODULES[peer]) if torch.cuda.is_available() else "no CUDA device"


@cache
def _not_importable(module: str) -> str:
    if module == MODULES["flash"] and not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without FlashAttention"
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last two: built for another torch or CUDA
        return f"{type(error).__name__}: {error}"
    return ""


def windowless(peer: str) -> str:
    """Why one of PEERS that runs here takes no window; empty where it takes one."""
    if peer == "sdpa":
        return ""
    if peer == "xformers":
        return "takes no window here"
    name = "varlen_attn" if peer == "flash" else "flash_attn_varlen_func"
    return "" if _takes_window(getattr(import_module(MODULES[peer]), name)) else f"{name} as installed takes no window"


@cache
def _takes_window(function: Callable[..., object]) -> bool:
    return "window_size" in inspect.signature(function).parameters
