"""OpenAI CLIP's vision tower (arXiv 2103.00020): a class token, a norm before the blocks, QuickGELU, biased linears.

LaVIN looks at the class token's residual stream after six evenly spaced blocks (4, 8, ..., 24 of ViT-L/14), LLaVA at
the patches before the last block. The tower's last norm and projection are neither run nor kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.mlp import PlainMLP
from models.vision.block import Attention
from models.vision.config import SelectFeature, TowerConfig
from models.vision.preprocessing import CLIP, Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig(TowerConfig):
    """The shape of a CLIP vision tower; the defaults are LaVIN's ViT-L/14 at 224 pixels."""

    family: ClassVar[str] = "clip"
    trained_on: ClassVar[Preprocessing] = CLIP
    has_pre_norm: ClassVar[bool] = True
    has_patch_bias: ClassVar[bool] = False

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    mlp_dim: int = 4096
    norm_eps: float = 1e-5
    select_feature: SelectFeature = "class_tokens"

    def parts(self) -> tuple[Attention, PlainMLP]:
        return Attention(self), PlainMLP(self.width, self.mlp_dim, "quick_gelu", bias=True)


CLIP_L_14_224 = ClipConfig()
CLIP_L_14_336 = ClipConfig(image_size=336, select_feature="patch")
