"""Calls of kernels/attention.py: LLaMA-3's grouped causal heads, Phi-3's window, a tower's bidirectional ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

import kernels.attention  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

HEAD_DIM = {64: 32, 1152: 72, 2560: 80, 3072: 96}  # by width: SigLIP, Phi-2, Phi-3


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    head_dim = HEAD_DIM.get(width) or min(width, 64 if width < 4096 else 128)
    heads = width // head_dim
    lengths = [min(1, tokens), min(1, tokens - 1), 0, 9 * (tokens - 2) // 16] if tokens > 1 else [tokens]
    bounds = torch.tensor([0, *lengths, tokens - sum(lengths)], dtype=torch.int32).cumsum(0).int().to(draw.device)
    scale = head_dim**-0.5
    kinds = [("causal, grouped", True, heads // math.gcd(heads, 4), 0), ("bidirectional", False, heads, 0)]
    if width < 4096:  # wider models have no window
        kinds.append(("window", True, heads, max(tokens // 4, 1)))
    for about, causal, groups, window in kinds:
        do, q, o = (draw(tokens, heads, head_dim) for _ in range(3))
        k, v = (draw(tokens, groups, head_dim) for _ in range(2))
        lse, delta = draw.fp32(heads, tokens) + 10, draw.fp32(heads, tokens)
        yield Call("attention_forward", (q, k, v, bounds, scale, causal, window), about)
        yield Call("attention_dq", (do, q, k, v, o, lse, bounds, scale, causal, window), about)
        yield Call("attention_dkdv", (do, q, k, v, lse, delta, bounds, scale, causal, window), about)
