"""A block of a vision tower: attention among all tokens of a tile, then an MLP; families differ in the two parts.

`N` tiles of `P` tokens, width `W`, `M` channels within the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from kernels.attention import varlen_attention
from kernels.rope import rope
from models.adapters.mma import MMAdapter, PlainAdapter
from models.halves import two_halves
from models.linear import Linear, calls, linears
from models.mlp import MLP
from models.norm import Norm
from models.recompute import Policy
from models.vision.config import TowerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all layers of one forward pass share."""

    cu_seqlens: Tensor  # int32 [N + 1], multiples of P
    num_tokens: int  # P
    router: Tensor | None  # int64 [N * P]: which row routes each row; None: its own
    seed: Tensor | None  # int64 [1]: dropout is on; None: off
    # cos, sin, fp32 [P, d / 2], and each row's place in its tile, int32 [N * P]; None: q and k do not turn
    rope: tuple[Tensor, Tensor, Tensor] | None = None


class Attention(nn.Module):
    """Attention among all tokens of a tile."""

    def __init__(self, config: TowerConfig, *, k_bias: bool = True) -> None:
        super().__init__()
        width = config.width
        self.head_dim = config.head_dim
        self.q = Linear(width, width, bias=True)
        self.k = Linear(width, width, bias=k_bias)
        self.v = Linear(width, width, bias=True)
        self.o = Linear(width, width, bias=True)

    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those together that are computed in one call."""
        return [*calls(self.q, self.k, self.v), (self.o,)]

    def forward(self, x: Tensor, context: Context) -> Tensor:  # [N * P, W] -> [N * P, W]
        return self.o(self.head_outputs(x, context), context.seed)

    def head_outputs(self, x: Tensor, context: Context) -> Tensor:
        """Side by side, as `o` reads them: [N * P, W] -> [N * P, W]"""
        parts = linears(x, self.q, self.k, self.v, seed=context.seed)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if context.rope is not None:
            q, k = rope(q, k, *context.rope, interleaved=True, inplace=True)
        return varlen_attention(q, k, v, context.cu_seqlens, context.num_tokens, causal=False).flatten(1)


class Block(nn.Module):
    """x + Attn(norm x), then x + MLP(norm x); each norm may carry an adapter.

    The stream is x + delta, as in models/language/block.py.
    """

    def __init__(self, config: TowerConfig, attention: Attention, mlp: MLP) -> None:
        super().__init__()
        self.policy: Policy = "save_all"  # what is kept for the backward pass
        self.attention_norm = Norm(config.width, config.norm_eps, bias=True)
        self.attention = attention
        self.mlp_norm = Norm(config.width, config.norm_eps, bias=True)
        self.mlp = mlp
        self.attention_adapter: MMAdapter | PlainAdapter | None = None
        self.mlp_adapter: MMAdapter | None = None

    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those together that are computed in one call."""
        return [*self.attention.groups(), *self.mlp.groups()]

    def forward(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """x, delta [N * P, W] -> x, delta [N * P, W]"""
        first, second = partial(self._attend, context=context), partial(self._mlp_to_hidden, context=context)
        x, delta = two_halves(
            self.policy, first, second, self.mlp.down, x, delta, context.seed, whole=self,
            of_second=(self.mlp_norm, self.mlp_adapter, self.mlp),
        )  # fmt: skip
        return x, delta

    def _attend(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """The first half: the stream that enters and what attention adds to it, [N * P, W] each."""
        x, h = _norm(x, delta, self.attention_norm, self.attention_adapter, context)
        return x, self.attention(h, context)

    def _mlp_to_hidden(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """The second half up to its last product: the stream that enters [N * P, W], the same as it leaves, and
        [N * P, M]."""
        x, h = _norm(x, delta, self.mlp_norm, self.mlp_adapter, context)
        return x, x, self.mlp.hidden(h, context.seed)


def _norm(
    x: Tensor, delta: Tensor | None, norm: Norm, adapter: MMAdapter | PlainAdapter | None, context: Context
) -> tuple[Tensor, Tensor]:
    if adapter is None:
        return norm.add(x, delta)
    if isinstance(adapter, PlainAdapter):
        return adapter(norm, x, delta, context.seed)
    x, mix = adapter.mix_all(norm, x, delta)
    return adapter(norm, x, None, mix, context.router, context.seed)
