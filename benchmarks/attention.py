"""Attention of packed samples as long as ScienceQA's, against the same samples padded to 512 tokens (goal G10).

A case with a window has Phi-3-mini's shape and one sample, longer than the window; its least operations are those
within it. padded is then the same product with the window's mask written out.

padded is scaled_dot_product_attention on [B, H, 512, d], causal: the flash path, as padded trainers call it; padding
and unpadding are not timed. nibble is the automatic choice, nibble_triton our own kernel whatever that is: these and
the others are what PREFERENCES of kernels/attention.py is made from. Least operations, within the samples:
4 s^2 H d / 2 forward, 2.5 times that backward (FlashAttention's convention).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command, lengths
from benchmarks.problem import Bench, Call, Case, Inputs, Layout, Problem, Variant, normal, products
from kernels.attention import attend, varlen_attention


def cases() -> list[Case]:
    language = [Case("attention", {"T": tokens, "H": 32, "d": 128}) for tokens in (512, 2048, 8192)]
    others = [Case("attention", {"T": 2048, "H": 32, "d": d}, quick=False) for d in (64, 80, 96)]
    window = Case("attention", {"T": 4096, "H": 32, "d": 96, "window": 2047}, quick=False)
    return [*language, *others, window]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, heads, d = case.shape["T"], case.shape["H"], case.shape["d"]
    window = min(case.shape["window"], tokens // 2) if "window" in case.shape else None
    samples = lengths.pack(tokens) if window is None else [tokens]
    longest = max(samples)
    cu_seqlens = torch.tensor(lengths.bounds(samples), dtype=torch.int32, device=device)

    def draw(generator: torch.Generator) -> Inputs:
        return {name: normal(generator, tokens, heads, d) for name in ("q", "k", "v")}

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        return (varlen_attention(q, k, v, cu_seqlens, longest, causal=True, window=window),)

    def own(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        return (attend("triton", q, k, v, cu_seqlens, longest, causal=True, window=window),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        parts = zip(*(inputs[name].split(samples) for name in ("q", "k", "v")), strict=True)
        return (torch.cat([alone(*qkv) for qkv in parts]),)

    def alone(*qkv: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in qkv)
        return _padded(q, k, v, window)[0].transpose(0, 1)

    reach = longest if window is None else window
    pairs = sum(length**2 - max(length - reach, 0) ** 2 for length in samples) / 2
    return Problem(
        draw=draw,
        differentiable=("q", "k", "v"),
        reference=reference,
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("nibble_triton", lambda: own),
            Variant("padded", lambda: _sdpa(window), layout=_padding(samples, max(longest, lengths.LONGEST))),
            Variant("varlen", lambda: _varlen(cu_seqlens, longest, window)),
            Variant("flash_attn", lambda: _flash_attn(cu_seqlens, longest, window), package="flash-attn"),
            Variant("xformers", lambda: _xformers(samples, window), package="xformers"),
        ),
        cost=products(4 * pairs * heads * d, 10 * pairs * heads * d),
    )


def _padded(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    band = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band)


def _sdpa(window: int | None) -> Call:
    return lambda inputs: (_padded(inputs["q"], inputs["k"], inputs["v"], window),)


def _padding(samples: list[int], longest: int) -> Layout:
    """[T, H, d] to [B, H, longest, d] and back."""

    def pad(x: Tensor) -> Tensor:
        out = x.new_zeros(len(samples), x.shape[1], longest, x.shape[2])
        for row, part in zip(out, x.split(samples), strict=True):
            row[:, : len(part)] = part.transpose(0, 1)
        return out

    def unpad(x: Tensor) -> Tensor:
        return torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(x, samples, strict=True)])

    return Layout(pad, unpad)


def _varlen(cu_seqlens: Tensor, longest: int, window: int | None) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    bounds: Any = (cu_seqlens, cu_seqlens, longest, longest)
    behind = -1 if window is None else window - 1
    return lambda inputs: (varlen_attn(inputs["q"], inputs["k"], inputs["v"], *bounds, window_size=(behind, 0)),)  # type: ignore[return-value]


def _flash_attn(cu_seqlens: Tensor, longest: int, window: int | None) -> Call:
    from flash_attn import flash_attn_varlen_func

    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    options = {"causal": True} if window is None else {"causal": True, "window_size": (window - 1, 0)}
    return lambda inputs: (flash_attn_varlen_func(inputs["q"], inputs["k"], inputs["v"], *bounds, **options),)


def _xformers(samples: list[int], window: int | None) -> Call:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    mask = BlockDiagonalCausalMask.from_seqlens(samples, device="cuda")
    if window is not None:
        mask = mask.make_local_attention(window)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (inputs[name][None] for name in ("q", "k", "v"))
        return (memory_efficient_attention(q, k, v, attn_bias=mask)[0],)

    return call


BENCH = Bench("attention", __doc__ or "", cases, problem, tiny={"T": 120, "H": 2, "d": 16})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
