"""Calls of kernels/norm.py for RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.norm  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

EPS = 1e-5


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    x, delta, dy, dstream = (draw(tokens, width) for _ in range(4))
    weight, statistics = draw(width), draw.fp32(tokens, 1).abs()
    yield Call("norm_forward", (x, None, weight, None, EPS, False), "RMSNorm")
    yield Call("norm_forward", (x, delta, weight, None, EPS, True), "add and RMSNorm")
    yield Call("norm_backward", (dy, None, None, x, weight, statistics), "RMSNorm")
    yield Call("norm_backward", (dy, None, dstream, x, weight, statistics), "add and RMSNorm")
    yield Call("norm_daffine", (dy, None, x, statistics, True), "RMSNorm")
