"""Calls of kernels/linear_cross_entropy.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.linear_cross_entropy  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    for vocabulary in (8 * width,) if width < 4096 else (32_000, 128_256):  # LLaMA-2's and LLaMA-3's
        labels, weights = draw.below(vocabulary, tokens), draw.fp32(tokens).abs()
        for about, gradient in (("loss", False), ("loss and gradient", True)):
            logits, losses = draw(tokens, vocabulary), draw.fp32(tokens)
            yield Call("cross_entropy_rows", (logits, labels, weights, weights.amax(), losses, gradient), about)
        bias, logits, losses = draw.fp32(vocabulary), draw(tokens, vocabulary), draw.fp32(tokens)
        yield Call("cross_entropy_rows", (logits, labels, weights, weights.amax(), losses, True, bias), "bias")
    yield Call("scale_gradient", (draw(tokens, width), draw.fp32(), draw.fp32(), draw.dtype), "hidden")
    yield Call("scale_gradient", (draw.fp32(width, 64), draw.fp32(), draw.fp32(), draw.dtype), "head")
