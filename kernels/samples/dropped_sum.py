"""Calls of kernels/dropped_sum.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.dropped_sum  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

SITE, DROPOUT = 131072, 0.1


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    seed = draw.below(2**40, 1)
    a, b, dy = (draw(tokens, width) for _ in range(3))
    yield Call("dropped_sum_forward", (a, b, DROPOUT, seed, SITE), "two branches")
    yield Call("dropped_sum_backward", (dy, DROPOUT, seed, SITE), "two branches")
    strided = draw(tokens, 2 * width)[:, :width]
    yield Call("dropped_sum_forward", (strided, None, DROPOUT, seed, SITE), "one branch, strided")
