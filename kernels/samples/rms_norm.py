"""Calls of kernels/rms_norm.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.rms_norm  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

EPS = 1e-5


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    x, dy, weight = draw(tokens, width), draw(tokens, width), draw(width)
    rstd = draw.fp32(tokens).abs()
    yield Call("rms_norm_forward", (x, weight, EPS))
    yield Call("rms_norm_backward", (dy, x, weight, rstd))
    yield Call("rms_norm_dweight", (dy, x, rstd))
