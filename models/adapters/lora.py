"""LoRA on the linears of blocks: its numbers, and where it goes. What it computes is in models/linear.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kernels.dropout import threshold
from kernels.lora_linear import LARGEST_RANK
from models.linear import Linear, LoRA

__all__ = ["LoRA", "LoRAConfig", "add_lora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """The numbers that all updates of a model share, and which linears have one.

    Raises:
        ValueError: a rank that the kernels do not take, or a dropout outside [0, 1).
    """

    rank: int = 64  # r
    alpha: float = 16.0  # the update is alpha / rank * B A
    dropout: float = 0.05  # on what A reads, in training
    targets: tuple[str, ...] = ()  # linears of a block by our names ("attention.q", "mlp.up"); empty: all of them

    def __post_init__(self) -> None:
        threshold(self.dropout)
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"LoRA takes ranks from 1 to {LARGEST_RANK}, got {self.rank}")


def add_lora(blocks: Sequence[nn.Module], config: LoRAConfig, first_site: int) -> None:
    """Gives every linear that `config.targets` names, in each block, an update of its own, not yet started.

    What is outside the blocks (a head, a projector) never gets one. Dropout sites are numbered in the order of the
    linears, so that those on one x (q, k, v; gate, up) are neighbours.

    Raises:
        ValueError: a target is the name of no linear.
    """
    found = [[(name, part) for name, part in block.named_modules() if isinstance(part, Linear)] for block in blocks]
    known = {name: None for linears in found for name, _ in linears}
    unknown = [target for target in config.targets if target not in known]
    if unknown:
        raise ValueError(f"LoRA: no linear is named {', '.join(unknown)}; there are {', '.join(known)}")
    site = first_site
    for linears in found:
        for name, linear in linears:
            if not config.targets or name in config.targets:
                scaling = config.alpha / config.rank
                linear.lora = LoRA(linear.in_features, linear.out_features, config.rank, scaling, config.dropout, site)
                site += 1
