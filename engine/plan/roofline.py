"""How long ops take on a card, from their FLOPs and bytes: one after another, each by whichever of the two is longer.

    seconds = sum over ops of max(flops / rate, bytes / bandwidth) + launches that no CUDA graph saves

The fractions of the card's rates that are reached are those of good implementations of each kind (performance goals of
the project): plain products 0.95 of the measured matrix rate, attention over short segments 0.40, a tower's products
with 1,024 channels 0.60, everything that is bound by memory 0.95 of a copy. Predictions: nothing here was measured on
this code, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan.cards import Card
from kernels.counting import Kind, Op

REACHED: dict[Kind, float] = {"product": 0.95, "attention": 0.40, "memory": 0.95}
NARROW = 0.60  # of the matrix rate, where products are as narrow as a vision tower's
COPY = 0.95
LAUNCH_SECONDS = 5e-6  # of the host, for each kernel
KERNEL_SECONDS = 2e-6  # the shortest kernel, in a CUDA graph too


def seconds(ops: Iterable[Op], card: Card, *, narrow: bool = False, graphs: bool = True) -> float:
    """Predicted time of these ops. `narrow`: the products are a tower's. Without `graphs` the host launches each."""
    total = 0.0
    for op in ops:
        reached = NARROW if narrow and op.kind == "product" else REACHED[op.kind]
        device = max(op.flops / (card.rate * reached), op.bytes / (card.bandwidth * COPY))
        total += max(device, op.launches * (KERNEL_SECONDS if graphs else LAUNCH_SECONDS))
    return total
