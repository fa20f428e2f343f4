"""Calls of kernels/activation.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.activation  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    z, da, bias, fp32_bias = draw(tokens, width), draw(tokens, width), draw(width), draw.fp32(width)
    for activation in ("silu", "gelu", "gelu_tanh"):
        dz, a = draw(tokens, width), draw(tokens, width)
        yield Call("bias_act_forward", (z, fp32_bias, activation), activation)
        yield Call("bias_act_backward", (da, z, fp32_bias, dz, a, activation, True), activation)
    dz = draw(tokens, width)
    yield Call("bias_act_forward", (z, None, "quick_gelu"), "no bias")
    yield Call("bias_act_backward", (da, z, None, dz, None, "quick_gelu", False), "no bias")
    dz = draw(tokens, width)
    yield Call("bias_act_backward", (da, z, bias, dz, None, "gelu_tanh", False), "frozen bias")
