"""How long ops take on a card, from their FLOPs and bytes: one after another, each by whatever of it is longest.

    seconds = sum over ops of max(flops / rate, bytes / bandwidth, launches x least seconds of a launch)

The fractions of the card's rates that are reached are those of good implementations of each kind (performance goals of
the project): plain products 0.95 of the measured matrix rate, attention over short segments 0.40, a tower's products
with 1,024 channels 0.60, everything that is bound by memory 0.95 of a copy. Predictions: nothing here was measured on
this code, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan.cards import Card
from kernels.counting import Op

PRODUCTS = 0.95  # of the matrix rate
NARROW = 0.60  # the same, where products are as narrow as a vision tower's
ATTENTION = 0.40  # the same
COPY = 0.95  # of the bandwidth
LAUNCH_SECONDS = 5e-6  # of the host, for each kernel
KERNEL_SECONDS = 2e-6  # the shortest kernel, in a CUDA graph too


def seconds(ops: Iterable[Op], card: Card, *, narrow: bool = False, graphs: bool = True) -> float:
    """Predicted time of these ops. `narrow`: the products are a tower's. Without `graphs` the host launches each."""
    total = 0.0
    for op in ops:
        reached = ATTENTION if op.kind == "attention" else NARROW if narrow else PRODUCTS
        device = max(op.flops / (card.rate * reached), op.bytes / (card.bandwidth * COPY))
        total += max(device, op.launches * (KERNEL_SECONDS if graphs else LAUNCH_SECONDS))
    return total
