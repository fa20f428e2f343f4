"""SigLIP's vision tower (arXiv 2303.15343): no class token, no norm before the blocks, tanh GELU, biased linears.

Its last norm and its pooling head are neither run nor kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.mlp import PlainMLP
from models.vision.block import Attention
from models.vision.config import TowerConfig
from models.vision.preprocessing import SIGLIP, Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipConfig(TowerConfig):
    """The shape of a SigLIP vision tower; the defaults are SigLIP-SO400M/14 at 384 pixels."""

    family: ClassVar[str] = "siglip"
    trained_on: ClassVar[Preprocessing] = SIGLIP
    has_class_token: ClassVar[bool] = False

    width: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 384
    mlp_dim: int = 4304
    norm_eps: float = 1e-6

    def parts(self) -> tuple[Attention, PlainMLP]:
        return Attention(self), PlainMLP(self.width, self.mlp_dim, "gelu_tanh", bias=True)


SIGLIP_SO400M_384 = SiglipConfig()
