"""Calls of kernels/rope.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kernels.rope  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

POSITIONS = 2048


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    """q of `width` channels, with heads of LLaMA and EVA02, of grouped-query models and of Phi (partial rotary)."""
    positions = draw.below(POSITIONS, tokens, dtype=torch.int32)
    whole = 128 if width >= 2048 else min(width // 2, 64)
    part = 80 if width % 80 == 0 else min(width // 2, 64)
    for about, head, turning, share, interleaved in (
        ("interleaved", whole, whole, 1, True),
        ("half-split, grouped-query", whole, whole, 4, False),
        ("partial", part, min(part // 2, 32), 1, False),
    ):
        heads = width // head
        kv_heads = max(heads // share, 1)
        table = draw.fp32(POSITIONS, turning // 2), draw.fp32(POSITIONS, turning // 2)
        rest = (*table, positions, interleaved, False)
        yield Call("rope_turn", ([draw(tokens, heads, head), draw(tokens, kv_heads, head)], *rest), about)
    qkv = draw(tokens, heads + 2 * kv_heads, head)
    yield Call("rope_turn_", ([qkv[:, :heads], qkv[:, heads : heads + kv_heads]], *rest), about)
