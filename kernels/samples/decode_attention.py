"""Calls of kernels/decode_attention.py: eight sequences with `tokens` places, grouped or not."""

from __future__ import annotations

import math
from collections.abc import Iterator

import kernels.decode_attention  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw
from kernels.samples.attention import HEAD_DIM

BATCH = 8


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    head_dim = HEAD_DIM.get(width) or min(width, 64 if width < 4096 else 128)
    heads = width // head_dim
    for about, groups, window in (
        ("", heads, tokens),
        ("grouped", heads // math.gcd(heads, 4), tokens),
        ("window", heads, max(tokens // 4, 1)),
    ):
        q, k, v = draw(BATCH, heads, head_dim), draw(BATCH, groups, head_dim), draw(BATCH, groups, head_dim)
        keys, values = (draw(BATCH, tokens, groups, head_dim) for _ in range(2))
        options = draw.below(tokens, BATCH), head_dim**-0.5, window
        yield Call("decode_attention", (q, k, v, keys, values, *options), about)
