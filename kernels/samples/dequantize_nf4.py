"""Calls of kernels/dequantize_nf4.py: one weight, and three parts, one of which starts inside a group of blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.dequantize_nf4 import NF4Arguments
from kernels.nf4 import BLOCK, BLOCK2
from kernels.samples import Call, Draw


def parts(draw: Draw, rows: list[int], columns: int) -> NF4Arguments:
    """Weights of random codes and scales, as the primitives take them."""
    first_blocks = [7 * i for i in range(len(rows))]
    values = [n * columns for n in rows]
    blocks = [-(-n // BLOCK) for n in values]
    return (
        [draw.below(256, -(-n // 2), dtype=torch.uint8) for n in values],
        [draw.below(256, n, dtype=torch.uint8) for n in blocks],
        [draw.fp32(-(-(n + before) // BLOCK2)) for n, before in zip(blocks, first_blocks, strict=True)],
        [draw.fp32(1) for _ in rows],
        rows,
        first_blocks,
    )


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    for about, rows in (("", [width]), ("3 parts", [width, 33, 16])):
        yield Call("dequantize_nf4_", (draw(sum(rows), width), *parts(draw, rows, width)), about)
