"""EVA02-CLIP's vision tower (arXiv 2303.15389): a class token, a position table and 2-D rotary positions, SwiGLU.

One more norm stands before each output projection (sub-LN). k has no bias, the blocks no norm before them. The last
norm and the projection are neither run nor kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.rope import rope_table_2d
from kernels.swiglu import swiglu
from models.linear import Linear, calls, linears
from models.mlp import MLP
from models.norm import Norm
from models.vision.block import Attention, Context
from models.vision.config import TowerConfig
from models.vision.preprocessing import CLIP, Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaConfig(TowerConfig):
    """The shape of an EVA02-CLIP vision tower; the defaults are EVA02-CLIP-L/14 at 336 pixels."""

    family: ClassVar[str] = "eva"
    trained_on: ClassVar[Preprocessing] = CLIP

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 336
    mlp_dim: int = 2730  # int(1024 * 2.6667)
    norm_eps: float = 1e-6

    def parts(self) -> tuple[EvaAttention, EvaMLP]:
        return EvaAttention(self), EvaMLP(self)

    def rope_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return rope_table_2d(self.head_dim, self.grid, self.grid, device=device)


EVA02_CLIP_L_336 = EvaConfig()


class EvaAttention(Attention):
    """Attention whose result is normalised before the output projection; the class token does not turn."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__(config, k_bias=False)
        self.inner_norm = Norm(config.width, config.norm_eps, bias=True)

    def head_outputs(self, x: Tensor, context: Context) -> Tensor:
        normed: Tensor = self.inner_norm(super().head_outputs(x, context))
        return normed


class EvaMLP(MLP):
    """hidden x = norm(silu(gate x) * up x)."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.mlp_dim, bias=True)
        self.up = Linear(config.width, config.mlp_dim, bias=True)
        self.inner_norm = Norm(config.mlp_dim, config.norm_eps, bias=True)
        self.down = Linear(config.mlp_dim, config.width, bias=True)

    def groups(self) -> list[tuple[Linear, ...]]:
        return [*calls(self.gate, self.up), (self.down,)]

    def hidden(self, x: Tensor, seed: Tensor | None) -> Tensor:
        normed: Tensor = self.inner_norm(swiglu(*linears(x, self.gate, self.up, seed=seed), reuse=True))
        return normed
