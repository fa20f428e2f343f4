"""What the NF4 kernels are expected to take on three cards. NOTHING HERE WAS MEASURED.

    python -m benchmarks.predictions

Time = least bytes / (a copy's bandwidth x share) + a kernel's start, or operations / (0.95 x matrix rate). Bytes and
operations are counted, rates are the cards' own, the shares are estimates from the compiled code's instruction counts.
benchmarks/README.md shows the table beside what the suite has measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

DEQUANTIZE_START_US = 1.0  # of the kernel within a CUDA graph, and its last blocks
FEW_ROWS_START_US = 1.7  # the same, with the lookup table and the sum over the warps
FEW_ROWS_SHARE = 0.87  # of the bandwidth, in between
GEMM_SHARE = 0.95  # of the matrix rate, cuBLAS on large products


@dataclass(frozen=True, slots=True)
class Card:
    """Rates: a copy's GB/s, a bf16 product's TFLOP/s; `dequantize`: the share of the bandwidth that it should reach."""

    name: str
    gbps: float
    tflops: float
    dequantize: float


CARDS = (
    Card("RTX 3090", 936, 71, dequantize=0.95),
    Card("A100 80 GB", 2039, 312, dequantize=0.94),
    Card("H200", 4300, 790, dequantize=0.93),
)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (13824, 5120))


def packed_bytes(n: int, k: int) -> float:
    """Of an NF4 weight [n, k] with double quantization."""
    return n * k * (1 / 2 + 1 / 64 + 4 / (64 * 256))


def dequantize_us(card: Card, n: int, k: int) -> float:
    return (packed_bytes(n, k) + 2 * n * k) / card.gbps / card.dequantize / 1e3 + DEQUANTIZE_START_US


def few_rows_us(card: Card, n: int, k: int) -> float:
    """One token."""
    return packed_bytes(n, k) / card.gbps / FEW_ROWS_SHARE / 1e3 + FEW_ROWS_START_US


def product_us(card: Card, m: int, n: int, k: int) -> float:
    return 2 * m * n * k / card.tflops / GEMM_SHARE / 1e6


def table() -> Iterator[str]:
    """Markdown lines: microseconds and, in brackets, the share of the bandwidth (G1, G13); ratios (G2)."""
    names = " | ".join(card.name for card in CARDS)
    yield f"| predicted, not measured | N x K | {names} |"
    yield "|---" * (len(CARDS) + 2) + "|"
    for n, k in SHAPES:
        for what, moved, time in (
            ("dequantize to bf16", packed_bytes(n, k) + 2 * n * k, dequantize_us),
            ("product with one token", packed_bytes(n, k), few_rows_us),
        ):
            spent = [(time(card, n, k), moved / card.gbps / 1e3) for card in CARDS]
            cells = " | ".join(f"{us:.1f} us ({least / us:.2f})" for us, least in spent)
            yield f"| {what} | {n} x {k} | {cells} |"
        for m in (2048, 8192):
            ratios = [1 + dequantize_us(card, n, k) / product_us(card, m, n, k) for card in CARDS]
            cells = " | ".join(f"{ratio:.2f} x cuBLAS" for ratio in ratios)
            yield f"| dequantize and product, {m:,} tokens, no overlap | {n} x {k} | {cells} |"


def main() -> int:
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
