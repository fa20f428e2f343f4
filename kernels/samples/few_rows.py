"""Calls of kernels/few_rows.py: one row, as in decoding, some, and as many as it takes; always 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kernels.few_rows  # noqa: F401 (registers the primitives)
from kernels.launches import MOST_FEW_ROWS
from kernels.samples import Call, Draw, dequantize_nf4, int8


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    dtype = torch.float16 if draw.dtype == torch.float32 else draw.dtype
    for about, most, splits in (("one", 1, 1), ("12, split", 12, 2), ("64", MOST_FEW_ROWS, 1)):
        x, rows = draw(min(tokens, most), width, dtype=dtype), [width, 33]
        biases = [None, draw(33, dtype=dtype)]
        yield Call("few_rows_nf4", (x, *dequantize_nf4.parts(draw, rows, width), [1, 1], biases, splits), about)
        yield Call("few_rows_int8", (x, *int8.parts(draw, rows, width), biases, splits), about)
    fused = dequantize_nf4.parts(draw, [width, 33], width)
    yield Call("few_rows_nf4", (draw(1, width, dtype=dtype), *fused, [2], [draw(width + 33, dtype=dtype)], 1), "fused")
