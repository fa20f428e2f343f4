"""Attention of packed samples as long as ScienceQA's, against the same samples padded to 512 tokens (goal G10).

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
    return [*language, *others]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, heads, d = case.shape["T"], case.shape["H"], case.shape["d"]
    samples = lengths.pack(tokens)
    longest = max(samples)
    cu_seqlens = torch.tensor(lengths.bounds(samples), dtype=torch.int32, device=device)

    def draw(generator: torch.Generator) -> Inputs:
        return {name: normal(generator, tokens, heads, d) for name in ("q", "k", "v")}

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        return (varlen_attention(inputs["q"], inputs["k"], inputs["v"], cu_seqlens, longest, causal=True),)

    def own(inputs: Inputs) -> tuple[Tensor, ...]:
        return (attend("triton", inputs["q"], inputs["k"], inputs["v"], cu_seqlens, longest, causal=True),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        parts = zip(*(inputs[name].split(samples) for name in ("q", "k", "v")), strict=True)
        return (torch.cat([_padded(*(x[None].transpose(1, 2) for x in qkv))[0].transpose(0, 1) for qkv in parts]),)

    pairs = sum(length**2 for length in samples) / 2
    return Problem(
        draw=draw,
        differentiable=("q", "k", "v"),
        reference=reference,
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("nibble_triton", lambda: own),
            Variant("padded", lambda: _sdpa, layout=_padding(samples)),
            Variant("varlen", lambda: _varlen(cu_seqlens, longest)),
            Variant("flash_attn", lambda: _flash_attn(cu_seqlens, longest), package="flash-attn"),
            Variant("xformers", lambda: _xformers(samples), package="xformers"),
        ),
        cost=products(4 * pairs * heads * d, 10 * pairs * heads * d),
    )


def _padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa(inputs: Inputs) -> tuple[Tensor, ...]:
    return (_padded(inputs["q"], inputs["k"], inputs["v"]),)


def _padding(samples: list[int]) -> Layout:
    """[T, H, d] to [B, H, 512, d] and back."""

    def pad(x: Tensor) -> Tensor:
        out = x.new_zeros(len(samples), x.shape[1], lengths.LONGEST, x.shape[2])
        for row, part in zip(out, x.split(samples), strict=True):
            row[:, : len(part)] = part.transpose(0, 1)
        return out

    def unpad(x: Tensor) -> Tensor:
        return torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(x, samples, strict=True)])

    return Layout(pad, unpad)


def _varlen(cu_seqlens: Tensor, longest: int) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    bounds: Any = (cu_seqlens, cu_seqlens, longest, longest)
    return lambda inputs: (varlen_attn(inputs["q"], inputs["k"], inputs["v"], *bounds, window_size=(-1, 0)),)  # type: ignore[return-value]


def _flash_attn(cu_seqlens: Tensor, longest: int) -> Call:
    from flash_attn import flash_attn_varlen_func

    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    return lambda inputs: (flash_attn_varlen_func(inputs["q"], inputs["k"], inputs["v"], *bounds, causal=True),)


def _xformers(samples: list[int]) -> Call:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    mask = BlockDiagonalCausalMask.from_seqlens(samples, device="cuda")

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (inputs[name][None] for name in ("q", "k", "v"))
        return (memory_efficient_attention(q, k, v, attn_bias=mask)[0],)

    return call


BENCH = Bench("attention", __doc__ or "", cases, problem, tiny={"T": 120, "H": 2, "d": 16})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
