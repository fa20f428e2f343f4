"""Calls of kernels/linear_act.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.linear_act  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

LAVIN = 128  # the hidden width of its projector


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    x, up, bias = draw(tokens, width), draw(4 * width, width), draw.fp32(4 * width)
    yield Call("linear_act_forward", (x, up, bias, "gelu", True), "gelu")
    yield Call("linear_act_forward", (x, up, bias, "quick_gelu", False), "quick_gelu, z not kept")
    yield Call("linear_act_forward", (x, draw(LAVIN, width), draw.fp32(LAVIN), "silu", True), "silu, narrow")
