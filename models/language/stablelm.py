"""StableLM-2 (arXiv 2402.17834): a LLaMA block with LayerNorms, biases on q, k, v; a quarter of a head turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.language.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StableLMConfig(DecoderConfig):
    """The shape of a StableLM model; the defaults are StableLM-2-1.6B's."""

    family: ClassVar[str] = "stablelm"

    vocab_size: int = 100352
    dim: int = 2048
    num_layers: int = 24
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_dim: int = 5632
    norm_eps: float = 1e-5
    rotary_dim: int | None = 16
    norm_bias: bool = True
    qkv_bias: bool = True


STABLELM_2_1_6B = StableLMConfig()
