"""Calls of kernels/norm_mma.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kernels.norm_mma  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

EPS, H, SCALE, DROPOUT, SITE, ROUTERS = 1e-5, 8, 1.0, 0.1, 3, 2


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    x, dy, weight = draw(tokens, width), draw(tokens, width), draw(width)
    adapter = [draw.fp32(H, width), draw.fp32(H), *2 * [draw.fp32(width, H // 2), draw.fp32(width)]]
    mix, row = draw.fp32(ROUTERS, 2).softmax(-1), draw.below(ROUTERS, tokens, dtype=torch.int32)
    seed = draw.below(1 << 31, 1)
    rstd, u, du, dm = draw.fp32(tokens).abs(), draw.fp32(tokens, H), draw.fp32(tokens, 2 * H), draw.fp32(tokens, 2)
    for about, bias, mean in (("RMSNorm", None, draw.fp32(0)), ("LayerNorm", draw.fp32(width), draw.fp32(tokens))):
        forward = (x, weight, bias, EPS, adapter, mix, row, SCALE, DROPOUT, seed, SITE)
        backward = (dy, x, weight, adapter, mix, row, SCALE, DROPOUT, seed, SITE, mean, rstd, u, bias is not None)
        dadapter = (dy, x, weight, bias, adapter, mix, row, SCALE, mean, rstd, u, du)
        yield Call("norm_mma_forward", forward, about)
        yield Call("norm_mma_backward", backward, about)
        yield Call("norm_mma_dadapter", dadapter, about)
    yield Call("norm_mma_dmix", (dm, row, ROUTERS))
