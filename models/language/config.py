"""The shape of a language model: what all families have, each with defaults of its own in the file of its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; its subclasses are the families.

    Raises:
        ValueError: heads do not divide the width, groups do not divide the heads, or the channels that turn are odd or
            more than a head has.
    """

    family: ClassVar[str]  # llama, phi, phi3, stablelm
    fused: ClassVar[bool] = False  # q, k, v are one linear, and gate and up another
    parallel: ClassVar[bool] = False  # attention and MLP read one norm and add to the stream together

    vocab_size: int
    dim: int  # width D of the residual stream
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # G
    ffn_dim: int  # width F of the MLP
    norm_eps: float
    rope_theta: float = 10000.0
    rotary_dim: int | None = None  # channels of a head that turn; None: all
    rope_interleaved: bool = False  # pairs (2i, 2i + 1) as in Meta's files; False: half-split as in Hugging Face's
    norm_bias: bool = False  # LayerNorm with a bias; False: RMSNorm
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    window: int | None = None  # a token sees itself and the window - 1 before it; None: all before it
    residual_dropout: float = 0.0  # on what attention and MLP add, in training

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of num_heads {self.num_heads}, and that one of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.rotary % 2 or not 0 < self.rotary <= self.head_dim:
            raise ValueError(
                f"rotary_dim must be even, positive and at most a head's {self.head_dim} channels; got {self.rotary}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window counts the token itself and must be at least 1; got {self.window}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rotary(self) -> int:
        """Channels of a head that turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim
