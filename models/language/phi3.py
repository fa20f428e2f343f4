"""Phi-3 (arXiv 2404.14219): a LLaMA block whose q, k, v are one linear, [q | k | v], and whose gate and up are one,
[gate | up]; attention may have a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.language.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """The shape of a Phi-3 model; the defaults are Phi-3-mini-4k's."""

    family: ClassVar[str] = "phi3"
    fused: ClassVar[bool] = True

    vocab_size: int = 32064
    dim: int = 3072
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_dim: int = 8192
    norm_eps: float = 1e-5
    window: int | None = 2047


PHI3_MINI = Phi3Config()
