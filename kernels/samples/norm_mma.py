"""Calls of kernels/norm_mma.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kernels.norm_mma  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

EPS, H, SCALE, DROPOUT, SITE, ROUTERS = 1e-5, 8, 1.0, 0.1, 3, 2


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    """A language model's placement, with and without the residual add; a tower's, where each token has its router."""
    x, delta, dy, dstream = (draw(tokens, width) for _ in range(4))
    adapter = [draw.fp32(H, width), draw.fp32(H), *2 * [draw.fp32(width, H // 2), draw.fp32(width)]]
    packed, affine, seed = draw(2 * H + 2, width), draw.fp32(2, H), draw.below(1 << 31, 1)
    rstd, u, du, dm = draw.fp32(tokens).abs(), draw.fp32(tokens, H), draw.fp32(tokens, H), draw.fp32(tokens, 2)
    row = draw.below(ROUTERS, tokens, dtype=torch.int32)

    rms = (draw(width), None)
    drop = (draw.fp32(ROUTERS, 2).softmax(-1), row, DROPOUT, seed, SITE)
    for about, before, after in (("RMSNorm", None, None), ("RMSNorm with residual", delta, dstream)):
        yield Call("norm_mma_forward", (x, before, *rms, EPS, packed, affine, *drop), about)
        yield Call(
            "norm_mma_backward", (dy, after, x, rms[0], packed, affine, *drop, draw.fp32(0), rstd, u, False), about
        )
    yield Call("norm_mma_dadapter", (dy, x, *rms, *drop[:2], SCALE, draw.fp32(0), rstd, u, du), "RMSNorm")

    layer, mean = (draw.fp32(width), draw.fp32(width)), draw.fp32(tokens)
    own = (draw.fp32(tokens, 2).softmax(-1), None)
    yield Call("norm_mma_pack", (x.dtype, *layer, adapter, SCALE))
    yield Call("norm_mma_forward", (x, delta, *layer, EPS, packed, affine, *own, 0.0, None, 0), "LayerNorm")
    backward = (dy, dstream, x, layer[0], packed, affine, *own, 0.0, None, 0, mean, rstd, u, True)
    yield Call("norm_mma_backward", backward, "LayerNorm")
    yield Call("norm_mma_dadapter", (dy, x, *layer, *own, SCALE, mean, rstd, u, du), "LayerNorm")
    yield Call("norm_mma_dmix", (dm, row, ROUTERS))
