"""A language model on packed tokens: embedding, blocks, last norm and head, whatever its family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.rope import rope_table
from models.adapters.lora import LoRAConfig, add_lora
from models.adapters.mma import AdapterConfig, MMAdapter
from models.embedding import Embedding
from models.language.attention import Context
from models.language.block import Block
from models.language.config import DecoderConfig
from models.language.layer import Layer
from models.language.phi import ParallelBlock
from models.linear import Linear
from models.norm import Norm

__all__ = ["Block", "Context", "Decoder", "DecoderConfig", "Layer", "ParallelBlock", "make_layer"]


def make_layer(config: DecoderConfig, index: int) -> Layer:
    """The block of this family, the model's `index`-th."""
    return ParallelBlock(config, index) if config.parallel else Block(config, index)


class Decoder(nn.Module):
    """Embedding, blocks, last norm and head. Its blocks' output is not normed yet: only supervised rows need it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(make_layer(config, i) for i in range(config.num_layers))
        self.norm = Norm(config.dim, config.norm_eps, bias=config.norm_bias)
        self.head = Linear(config.dim, config.vocab_size, bias=config.head_bias)

    def add_adapters(self, config: AdapterConfig, placement: str, first_site: int) -> None:
        """Puts an MMA adapter after each attention norm (`attn`), and after each MLP norm too (`block`).

        Raises:
            ValueError: `block` in a family whose attention and MLP share one norm.
        """
        for i, layer in enumerate(self.blocks()):
            first = MMAdapter(self.config.dim, config, first_site + 2 * i)
            second = MMAdapter(self.config.dim, config, first_site + 2 * i + 1) if placement == "block" else None
            layer.add_adapters(first, second)

    def add_lora(self, config: LoRAConfig, first_site: int) -> None:
        """Puts LoRA on the linears of the blocks that `config` names, never on the head.

        Raises:
            ValueError: a target is the name of no linear; the message lists them.
        """
        add_lora(self.blocks(), config, first_site)

    def blocks(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def rope_table(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [positions, r / 2], on `device`, for r channels of a head that turn."""
        cos, sin = rope_table(self.config.rotary, positions, self.config.rope_theta)
        return cos.to(device), sin.to(device)
