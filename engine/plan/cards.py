"""The cards that a plan speaks about: what they hold, and how fast they compute and copy.

Rates are those of 16-bit products with fp32 sums; products of fp32 tensors run in fp32, without tensor cores. Nominal
figures are NVIDIA's data sheets; the rate of an H200 and the bandwidth of its copies were measured, though not by the
benchmarks here, and an H100 has the same chip, so its rate is taken to be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

COPIED = 0.9  # of the nominal bandwidth, what a copy reaches: 4,300 of 4,800 GB/s measured on an H200


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU. `capability` as in kernels/launches.py; 0 is Triton's interpreter and csrc's emulator."""

    name: str
    memory: int  # bytes that a process can have: what nvidia-smi calls the total, less the driver's reserve
    capability: int
    rate: float  # FLOP/s of products
    bandwidth: float  # bytes/s of a copy
    rate_fp32: float = 0.0  # FLOP/s of products of fp32 tensors; 0: as `rate`

    def in_fp32(self) -> Card:
        """The card as a run in fp32 finds it."""
        return replace(self, rate=self.rate_fp32 or self.rate)


def _card(name: str, gib: float, capability: int, tflops: float, fp32_tflops: float, nominal_gb_per_s: float) -> Card:
    return Card(
        name, int(gib * 2**30), capability, tflops * 1e12, COPIED * nominal_gb_per_s * 1e9, fp32_tflops * 1e12
    )  # fmt: skip


CARDS: tuple[Card, ...] = (
    _card("RTX 3090", 23.6, 86, 71, 35.6, 936),
    _card("RTX 4090", 23.6, 89, 165, 82.6, 1008),
    _card("A100 40 GB", 39.4, 80, 312, 19.5, 1555),
    _card("A100 80 GB", 79.2, 80, 312, 19.5, 2039),
    _card("H100", 79.2, 90, 790, 67, 3350),
    _card("H200", 139.8, 90, 790, 67, 4800),
)


def card_named(name: str) -> Card | None:
    """The card that a driver calls `name` ("NVIDIA H200", "NVIDIA A100-SXM4-40GB"); None for one that is not here."""
    fitting = [card for card in CARDS if card.name.removeprefix("RTX ").split()[0] in name]
    if "40GB" in name:
        fitting = [card for card in fitting if card.name.endswith("40 GB")]
    return fitting[-1] if fitting else None
