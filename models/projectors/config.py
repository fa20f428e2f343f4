"""Which projectors there are, and how many embeddings each makes of a tile's features."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isqrt

MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
SPP = ("sppv1", "sppv2", "sppv3")
GROUPED = ("minigpt", "vanilla")
GROUP = 4  # tokens that `minigpt` and `vanilla` put side by side
KINDS = ("lavin", "linear", "identity", *SPP, *GROUPED, "ldp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig:
    """Which projector; the widths on its two sides are the models'."""

    kind: str = "lavin"
    hidden: int = 128  # width of lavin's bottleneck

    def __post_init__(self) -> None:
        if self.kind not in KINDS and not MLP.fullmatch(self.kind):
            raise ValueError(
                f"unknown projector {self.kind!r}; there are mlpNx_gelu (as mlp2x_gelu) and {', '.join(KINDS)}"
            )

    def tokens(self, features: int) -> int:
        """How many embeddings K' a tile's K features give.

        Raises:
            ValueError: this projector cannot put so many features together.
        """
        if self.kind in GROUPED:
            if features % GROUP:
                raise ValueError(
                    f"projector {self.kind} makes one embedding of {GROUP} features, and {features} are no multiple of "
                    f"it; choose one of {', '.join(SPP)}, or a tower with an even number of patches a side"
                )
            return features // GROUP
        if self.kind in SPP:
            return (grid_side(self.kind, features) // 2) ** 2
        return ((grid_side(self.kind, features) + 1) // 2) ** 2 if self.kind == "ldp" else features


def grid_side(kind: str, features: int) -> int:
    """Features a side of the square grid of `features`, row by row.

    Raises:
        ValueError: they are no such grid.
    """
    side = isqrt(features)
    if side**2 != features:
        raise ValueError(
            f"projector {kind} reads a square grid of patches, and a tile has {features} features; take patches only "
            "(select_feature patch)"
        )
    return side
