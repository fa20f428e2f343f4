"""Calls of kernels/projector.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.projector  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    z, da, bias = draw(tokens, width), draw(tokens, width), draw.fp32(width)
    for activation in ("silu", "gelu"):
        yield Call("bias_act_forward", (z, bias, activation), activation)
        yield Call("bias_act_backward", (da, z, bias, activation), activation)
