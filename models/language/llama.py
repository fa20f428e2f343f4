"""LLaMA-1/2/3 and Vicuna (arXiv 2302.13971, 2307.09288, 2407.21783): RMSNorm, RoPE, SwiGLU, no biases, untied head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.language.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a LLaMA model; the defaults are LLaMA-1-7B's in Meta's files."""

    family: ClassVar[str] = "llama"

    vocab_size: int = 32000
    dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_dim: int = 11008
    norm_eps: float = 1e-6
    rope_interleaved: bool = True


# The models in the order of Meta's files; those of Hugging Face's have rope_interleaved=False.
LLAMA_7B = LlamaConfig()
LLAMA_13B = LlamaConfig(dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_dim=13824)
LLAMA2_7B = LlamaConfig(norm_eps=1e-5)
LLAMA2_13B = LlamaConfig(dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_dim=13824, norm_eps=1e-5)
LLAMA3_8B = LlamaConfig(vocab_size=128256, num_kv_heads=8, ffn_dim=14336, norm_eps=1e-5, rope_theta=500000.0)
