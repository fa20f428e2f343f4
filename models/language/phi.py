"""Phi-1.5 (arXiv 2309.05463) and Phi-2: attention and MLP side by side behind one LayerNorm, biases everywhere.

    n = norm(x)        x' = x + drop(Attn(n)) + drop(MLP(n))        MLP(n) = down(gelu_tanh(up n + b)) + b'

An MMA adapter stands before attention alone; the MLP reads the plain norm. The files' fc1, fc2, dense are up, down, o.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from kernels.dropped_sum import dropped_sum
from models.adapters.mma import MMAdapter
from models.cache import LayerCache
from models.language.attention import Context
from models.language.config import DecoderConfig
from models.language.layer import RESIDUAL_SITE, Layer
from models.linear import Linear
from models.mlp import PlainMLP
from models.recompute import recomputed


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiConfig(DecoderConfig):
    """The shape of a Phi model; the defaults are Phi-2's. Bunny's Phi models have no head_bias."""

    family: ClassVar[str] = "phi"
    parallel: ClassVar[bool] = True

    vocab_size: int = 51200
    dim: int = 2560
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_dim: int = 10240
    norm_eps: float = 1e-5
    rotary_dim: int | None = 32
    norm_bias: bool = True
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = True
    residual_dropout: float = 0.1


PHI_1_5 = PhiConfig(dim=2048, num_layers=24, ffn_dim=8192, residual_dropout=0.0)
PHI_2 = PhiConfig()


class ParallelBlock(Layer):
    """x + Attn(adapted norm x) + MLP(norm x).

    `recompute_mlp` computes the MLP alone again, from the norm [T, D] that it shares with attention and that is kept
    for it; behind an adapter, where the MLP has a norm of its own, that norm too, and then nothing is kept for it.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__(config, index)
        self.mlp = PlainMLP(config.dim, config.ffn_dim, "gelu_tanh", bias=config.mlp_bias)

    def groups(self) -> list[tuple[Linear, ...]]:
        return [*self.attention.groups(), *self.mlp.groups()]

    def add_adapters(self, first: MMAdapter, second: MMAdapter | None) -> None:
        if second is not None:
            raise ValueError("a parallel block has one norm: MMA adapters go before attention alone, placement 'attn'")
        self.attention_adapter = first

    def forward(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, delta [T, D] -> x, delta [T, D]"""
        last, seed = (self.attention.o, self.mlp.down), context.seed
        if self.policy == "keep_input" and cache is None:
            body = partial(self._to_hidden, context=context)
            x, attended, added = recomputed(body, last, x, delta, self.parameters(), seed)
        else:
            x, n, heads = self._attend(x, delta, context, cache)
            attended = self.attention.o(heads, seed)
            x, added = self._mlp(x, n, context, again=self.policy == "recompute_mlp" and cache is None)
        return x, dropped_sum(
            self._drop_path(attended, context, 0), self._drop_path(added, context, 1),
            dropout=self.residual_dropout, seed=seed, site=RESIDUAL_SITE + 2 * self.index,
        )  # fmt: skip

    def _attend(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The stream that enters, its norm as the MLP reads it (None: not computed yet), and attention up to `o`."""
        if self.attention_adapter is None:
            x, n, of_mlp = self.attention_norm.add_for_two(x, delta)
            return x, of_mlp, self.attention.head_outputs(n, context, cache)
        x, n = self._norm(x, delta, self.attention_norm, self.attention_adapter, context, cache)
        return x, None, self.attention.head_outputs(n, context, cache)

    def _mlp(self, x: Tensor, n: Tensor | None, context: Context, *, again: bool) -> tuple[Tensor, Tensor]:
        """The stream and what the MLP adds to it; `again`: it is computed again in the backward pass."""
        down, seed = self.mlp.down, context.seed
        if not again:
            x, hidden = self._mlp_to_hidden(x, n, context)
            return x, down(hidden, seed)
        if n is None:
            own = (*self.attention_norm.parameters(), *self.mlp.parameters())
            x, added = recomputed(partial(self._from_stream, context=context), down, x, None, own, seed)
            return x, added
        (added,) = recomputed(lambda n, _: (n, self.mlp.hidden(n, seed)), down, n, None, self.mlp.parameters(), seed)
        return x, added

    def _mlp_to_hidden(self, x: Tensor, n: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """The stream [T, D] and the MLP up to its last product, [T, F]."""
        if n is None:
            x, n = self.attention_norm.add(x, None)
        return x, self.mlp.hidden(n, context.seed)

    def _from_stream(self, x: Tensor, _: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """The stream that enters, the same as it leaves, [T, D] each, and [T, F]."""
        x, hidden = self._mlp_to_hidden(x, None, context)
        return x, x, hidden

    def _to_hidden(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """The stream that enters, the same as it leaves, attention up to `o`, [T, D] each, and [T, F]."""
        stream, n, heads = self._attend(x, delta, context, None)
        x, hidden = self._mlp_to_hidden(stream, n, context)
        return stream, x, heads, hidden
