"""Calls of kernels/adamw.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kernels.adamw  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

LAYERS = 64  # of one adapter matrix each
OPTIONS = (0.9, 0.95, 1e-8, 0.02)  # betas, eps, weight decay


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    size = LAYERS * width
    step, inv_scale, squares = draw.fp32(1).abs(), draw.fp32(1).abs(), draw.fp32(size // 1024).abs()
    for about, dtype, guard, copy, max_norm in (
        ("fp32 weights", torch.float32, draw.fp32(1)[0], None, None),
        ("16-bit weights", draw.dtype, None, draw(size), 1.0),
    ):
        grad = draw(size, dtype=dtype)
        state = (draw.fp32(size), grad, draw.fp32(size), draw.fp32(size).square(), step.clone())
        scalars = (draw.fp32(1).abs(), inv_scale, squares, guard, copy)
        yield Call("adamw_squares", (grad, inv_scale), about)
        yield Call("adamw_update", (*state, *scalars, size // 2, *OPTIONS, max_norm), about)
