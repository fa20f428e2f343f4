"""What every projector is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from models.projectors.config import ProjectorConfig


class Projector(nn.Module, ABC):
    """Features [M, K, W] of M tiles -> embeddings [M, K', D], in the features' dtype; parameters stay in fp32."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config

    def tokens(self, features: int) -> int:
        """How many embeddings K' a tile's K features give."""
        return self.config.tokens(features)

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """[M, K, W] -> [M, K', D]"""

    @abstractmethod
    def reset(self) -> None:
        """Fresh parameters, where training starts without any."""


class TokenProjector(Projector):
    """A projector that makes one embedding of each feature."""

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """[M * K, W] -> [M * K, D], in x's dtype."""


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    """[..., in] -> [..., out], in x's dtype."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
