"""Projectors that look at each feature alone: LaVIN's neck, and LLaVA's linear layers with a GELU between two of them.

The products are those of kernels/projector.py and kernels/linear_act.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.linear_act import linear_act
from kernels.projector import projector_mlp
from models.projectors.base import TokenProjector, affine
from models.projectors.config import ProjectorConfig


class LavinProjector(TokenProjector):
    """LaVIN's visual neck."""

    def __init__(self, config: ProjectorConfig, vision_dim: int, language_dim: int) -> None:
        super().__init__(config)
        self.fc1 = nn.Linear(vision_dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, language_dim)

    def reset(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def project(self, x: Tensor) -> Tensor:
        return projector_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, "silu")


class MLPProjector(TokenProjector):
    """`linear` and `mlpNx_gelu`: N linears with a GELU between two of them."""

    def __init__(self, config: ProjectorConfig, vision_dim: int, language_dim: int, depth: int) -> None:
        super().__init__(config)
        widths = [vision_dim] + [language_dim] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(width, language_dim) for width in widths)

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def reset(self) -> None:
        """torch's own start of a linear layer, as in LLaVA and Bunny."""
        for layer in self._linears():
            layer.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        *first, last = self._linears()
        if not first:
            return affine(x, last)
        *first, before = first
        for layer in first:
            x = linear_act(x, layer.weight, layer.bias, "gelu")
        return projector_mlp(x, before.weight, before.bias, last.weight, last.bias, "gelu")


class Identity(TokenProjector):
    """The features as they are."""

    def project(self, x: Tensor) -> Tensor:
        return x

    def reset(self) -> None:
        """Nothing."""
