"""Softmax attention within the segments of a pack (no padding; a token sees its own segment only).

    o[t, h] = sum_s p[t, h, s] v[s, g],  p[t, h, :] = softmax_s(scale q[t, h] . k[s, g])
    s in t's segment, s <= t where causal, s > t - window where there is one; g = h // (H / G)

q, o [T, H, d], k, v [T, G, d] (grouped-query: H a multiple of G), segments cu_seqlens[i] .. cu_seqlens[i + 1].

The own kernels (attention_kernels.py) are FlashAttention 2 (arXiv 2307.08691) on tiles of neighbouring tokens of the
pack, where others start a tile with every segment: 2,048 tokens are 32 tiles of 64 however they are divided, a segment
of length one costs nothing of its own, and the grid depends on no data. Counted for lengths 1, 1, 600, 310, 290, 270,
250, 200, 126, causal: 1.44 times the scores that are seen are computed, with tiles of 128 x 64 for each segment 1.76.
q, k and v may be views whose channels are contiguous. Saved: q, k, v, o and one fp32 lse a token and head.

    forward    o and lse
    dq         ds = p (do . v - delta), delta = do . o, dq = scale sum_s ds k; writes delta too
    dkdv       dv = sum_t p do, dk = scale sum_t ds q, summed over the query heads of the group by one program

Two kernels backward, with the scores computed in both (7 products, not 5), for sums in a fixed order without atomics.
Bytes: q, do and o are read and o, dq, dk, dv written once; but k and v are read by every tile of queries that sees them
and by every query head of their group, and in dkdv q and do by every tile of keys. That is the algorithm: scores are
not stored, so what makes them is read again, and by neighbouring programs, so from the L2 cache.
A window takes the tiles that lie outside of it from all three, and costs a mask at its edge.
A value that is not finite spreads to the segments that share a tile with it, through 0 * inf.

The automatic choice on a GPU is PREFERENCES; attention_peers.py has what else can be taken, from torch's own on. The
reference backend is its scaled_dot_product_attention for each segment.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention_kernels import attention_dkdv_kernel, attention_dq_kernel, attention_forward_kernel
from kernels.attention_peers import PEERS, Attend, missing, windowless
from kernels.dispatch import card, choose, launch, on_another_card, primitive, run, unit_stride
from kernels.launches import ANY, Launch

WIDEST = 128  # channels of a head that the own kernels take
HALF = (torch.float16, torch.bfloat16)


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, causal: bool, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """The formula with one block-diagonal score matrix [H, T, T], in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    segment = torch.bucketize(torch.arange(q.shape[0], device=q.device), cu_seqlens, right=True)
    hidden = segment[:, None] != segment
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(-window)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


def _launch(kernel: str, q: Tensor) -> Launch:
    """fp32 has choices of its own, above those of 16 bits."""
    return launch(kernel, q.shape[2] + (WIDEST if q.dtype == torch.float32 else 0), q)


def _constants(q: Tensor, k: Tensor, cols: int, causal: bool, window: int) -> dict[str, object]:
    head_dim = q.shape[2]
    rest = max(16, triton.next_power_of_2(head_dim - cols)) if head_dim > cols else 0
    return {"GROUP": q.shape[1] // k.shape[1], "D": head_dim, "REST": rest, "CAUSAL": causal, "WINDOW": window}


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """The unit that strides are counted in, and those of tokens and heads of each tensor."""
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return unit, [stride // unit for stride in strides]


def _forward_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@primitive(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, bool causal, int window) "
    "-> (Tensor, Tensor)",
    fake=_forward_outputs,
)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """q, k, v with unit last stride, scale > 0, window 0 for none -> o [T, H, d], lse [H, T] fp32 (powers of two)."""
    o, lse = _forward_outputs(q, k, v, cu_seqlens, scale, causal, window)
    config = _launch("attention_forward", q)
    unit, strides = _strides(q, k, v)
    run(
        attention_forward_kernel, (triton.cdiv(q.shape[0], config.rows), q.shape[1]), config,
        q, k, v, cu_seqlens, o, lse, *strides, q.shape[0], cu_seqlens.shape[0] - 1, scale * math.log2(math.e),
        **_constants(q, k, config.cols, causal, window), UNIT=unit,
    )  # fmt: skip
    return o, lse


def _dq_outputs(do: Tensor, q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@primitive(
    "attention_dq(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens, float scale, "
    "bool causal, int window) -> (Tensor, Tensor)",
    fake=_dq_outputs,
)
def attention_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """do, q, k, v with unit last stride, o and lse of the forward -> dq [T, H, d], delta [H, T] fp32."""
    dq, delta = _dq_outputs(do, q)
    config = _launch("attention_dq", q)
    unit, strides = _strides(q, k, v, do)
    run(
        attention_dq_kernel, (triton.cdiv(q.shape[0], config.rows), q.shape[1]), config,
        q, k, v, do, o, lse, cu_seqlens, dq, delta, *strides, q.shape[0], cu_seqlens.shape[0] - 1,
        scale, scale * math.log2(math.e), **_constants(q, k, config.cols, causal, window), UNIT=unit,
    )  # fmt: skip
    return dq, delta


def _dkdv_outputs(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@primitive(
    "attention_dkdv(Tensor do, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor cu_seqlens, float scale, "
    "bool causal, int window) -> (Tensor, Tensor)",
    fake=_dkdv_outputs,
)
def attention_dkdv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, cu_seqlens: Tensor, scale: float,
    causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """do, q, k, v with unit last stride, lse of the forward, delta of attention_dq -> dk, dv [T, G, d]."""
    dk, dv = _dkdv_outputs(do, q, k, v)
    config = _launch("attention_dkdv", q)
    unit, strides = _strides(q, k, v, do)
    run(
        attention_dkdv_kernel, (triton.cdiv(q.shape[0], config.rows), k.shape[1]), config,
        q, k, v, do, lse, delta, cu_seqlens, dk, dv, *strides, q.shape[0], cu_seqlens.shape[0] - 1,
        scale, scale * math.log2(math.e), **_constants(q, k, config.cols, causal, window), UNIT=unit,
    )  # fmt: skip
    return dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool, window: int
    ) -> Tensor:
        o, lse = attention_forward(q, k, v, cu_seqlens, scale, causal, window)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.options = scale, causal, window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        do = unit_stride(do)
        dk = dv = None
        dq, delta = attention_dq(do, q, k, v, o, lse, cu_seqlens, *ctx.options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dk, dv = attention_dkdv(do, q, k, v, lse, delta, cu_seqlens, *ctx.options)
        return dq, dk, dv, None, None, None, None


def _own(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    if q.shape[2] > WIDEST or scale <= 0:
        raise ValueError(f"the Triton kernels take heads of at most {WIDEST} channels and a scale above 0; got "
                         f"{q.shape[2]} and {scale}")  # fmt: skip
    q, k, v = (unit_stride(x) for x in (q, k, v))
    o = _Attention.apply(q, k, v, cu_seqlens.contiguous(), scale, causal, window or 0)  # type: ignore[no-untyped-call]
    return cast(Tensor, o)


IMPLEMENTATIONS: dict[str, Attend] = {"triton": _own, **PEERS}


def implementations() -> dict[str, str]:
    """Why each implementation cannot run on this machine, by name; empty where it can."""
    return {name: _missing(name) for name in IMPLEMENTATIONS}


def _missing(name: str) -> str:
    if name != "triton":
        return missing(name)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "" if interpreted or on_another_card() or torch.cuda.is_available() else "no CUDA device"


def _windowless(name: str, window: int | None) -> str:
    """Why an implementation does not take this window; empty where it does, or where there is none."""
    return "" if window is None or name == "triton" else windowless(name)


@dataclass(frozen=True, slots=True)
class Preference:
    """Where the automatic choice takes an implementation."""

    implementation: str
    dtypes: tuple[torch.dtype, ...]
    oldest: int  # compute capability, as 80
    head_dim: int  # largest
    multiple: int = 1  # which head dims are of
    longest: int = ANY  # max_seqlen up to which it holds
    measured: bool = False  # in benchmarks/results; else a prediction


# The first that holds is taken. None has been measured: that FlashAttention 2 in CUDA is fastest is a prediction, for
# short segments a weak one. Without tensor cores, which Triton uses from sm_80 on, the own kernels are slow.
PREFERENCES = (
    Preference("flash", HALF, oldest=80, head_dim=256, multiple=8),
    Preference("triton", (*HALF, torch.float32), oldest=80, head_dim=WIDEST),
)


def _preferred(q: Tensor, max_seqlen: int, window: int | None) -> tuple[str, str]:
    """-> (implementation or "reference", why), by the table."""
    if not q.is_cuda:
        return "triton", ""  # in the interpreter
    capability, head_dim = card(q), q.shape[-1]
    passed_over = ""  # what would have been better and is not here
    for row in PREFERENCES:
        fits = q.dtype in row.dtypes and capability >= row.oldest and max_seqlen <= row.longest
        if not (fits and head_dim <= row.head_dim and head_dim % row.multiple == 0):
            continue
        if obstacle := _missing(row.implementation) or _windowless(row.implementation, window):
            passed_over += f"; not {row.implementation}: {obstacle}"
            continue
        why = "fastest here" if row.measured else "predicted to be the fastest here"
        return row.implementation, why + passed_over
    return "reference", f"no kernel for {q.dtype} with head dim {head_dim} on sm_{capability}{passed_over}"


def attend(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, causal: bool, scale: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """`varlen_attention` by one of IMPLEMENTATIONS. Raises ValueError where that cannot run here, and as it does."""
    window = _narrower(window, min(max_seqlen, q.shape[0]), causal)
    obstacle = "unknown"
    if implementation in IMPLEMENTATIONS:
        obstacle = _missing(implementation) or _windowless(implementation, window)
    if obstacle:
        others = (name for name, why_not in implementations().items() if not why_not)
        here = ", ".join(name for name in others if not _windowless(name, window))
        raise ValueError(f"attention implementation {implementation!r}: {obstacle}; accepted here: {here}")
    if q.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "attention takes q [T, H, d] and k, v [T, G, d] with H a multiple of G; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention takes q, k and v of one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if not q.shape[0]:
        return q.clone()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q, k, v, cu_seqlens, max_seqlen, causal, scale, window)


def _narrower(window: int | None, longest: int, causal: bool) -> int | None:
    """`window` where it hides anything of segments this long. Raises ValueError for one that cannot be."""
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention takes a window of at least 1 token, and only causal; got window={window}, "
                         f"causal={causal}")  # fmt: skip
    return None if window is None or window >= longest else window


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of q [T, H, d] over k, v [T, G, d] within segments -> [T, H, d].

    cu_seqlens int32 [S + 1] on the tensors' device, from 0 to T; segments may be empty. max_seqlen: the longest one (or
    any bound on it), on the host. scale: 1 / sqrt(d) by default. window (causal only): a token sees itself and the
    window - 1 tokens before it; where max_seqlen or T is not above it, it is plain causal attention, to the bit.
    Raises ValueError where shapes, dtypes or the window do not fit.
    """
    window = _narrower(window, min(max_seqlen, q.shape[0]), causal)
    best, why = _preferred(q, max_seqlen, window)
    backend = choose("attention", q, tuple(dict.fromkeys((best, "triton", "reference"))), why=why)
    implementation = "sdpa" if backend == "reference" else backend
    return attend(implementation, q, k, v, cu_seqlens, max_seqlen, causal=causal, scale=scale, window=window)
