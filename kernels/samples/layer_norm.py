"""Calls of kernels/norm.py for LayerNorm, with parameters in fp32 as in the towers."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.norm  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

EPS = 1e-5


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    x, delta, dy, dy2, dstream = (draw(tokens, width) for _ in range(5))
    weight, bias, statistics = draw.fp32(width), draw.fp32(width), draw.fp32(tokens, 2).abs()
    yield Call("norm_forward", (x, None, weight, bias, EPS, False), "LayerNorm")
    yield Call("norm_forward", (x, delta, weight, bias, EPS, False), "add and LayerNorm")
    yield Call("norm_backward", (dy, None, None, x, weight, statistics), "LayerNorm")
    yield Call("norm_backward", (dy, None, dstream, x, weight, statistics), "add and LayerNorm")
    yield Call("norm_backward", (dy, dy2, dstream, x, weight, statistics), "two branches")
    yield Call("norm_daffine", (dy, dy2, x, statistics, False), "LayerNorm")
