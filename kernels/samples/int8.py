"""Calls of kernels/int8.py: one weight, and three."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import kernels.int8  # noqa: F401 (registers the primitive)
from kernels.samples import Call, Draw


def parts(draw: Draw, rows: list[int], columns: int) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and scales of weights."""
    return [draw.below(128, n, columns, dtype=torch.int8) for n in rows], [draw.fp32(n) for n in rows]


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    for about, rows in (("", [width]), ("3 parts", [width, 33, 16])):
        yield Call("dequantize_int8_", (draw(sum(rows), width), *parts(draw, rows, width)), about)
