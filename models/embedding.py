"""A table of rows, one for each id."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """torch's, but nothing is drawn on the meta device: torch imports its compiler to do so, 0.6 s of every start."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
