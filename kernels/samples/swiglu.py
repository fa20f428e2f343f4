"""Calls of kernels/swiglu.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.swiglu  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    dh, gate, up = (draw(tokens, width) for _ in range(3))
    dgate, dup = (draw(tokens, width) for _ in range(2))
    yield Call("swiglu_forward", (gate, up), "separate")
    yield Call("swiglu_backward", (dh, gate, up, dgate, dup), "separate")
    gate, up = draw(tokens, 2 * width).chunk(2, dim=1)
    dgate, dup = draw(tokens, 2 * width).chunk(2, dim=1)
    yield Call("swiglu_forward", (gate, up), "packed")
    yield Call("swiglu_backward", (dh, gate, up, dgate, dup), "packed")
