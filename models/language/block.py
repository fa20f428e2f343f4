"""The sequential block of LLaMA, Phi-3 and StableLM: norm before, attention, norm, gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from kernels.swiglu import swiglu, swiglu_packed
from models.adapters.mma import MMAdapter
from models.cache import LayerCache
from models.language.attention import Context
from models.language.config import DecoderConfig
from models.language.layer import Layer
from models.linear import Linear, calls, linears
from models.mlp import MLP
from models.norm import Norm
from models.recompute import recomputed


class GatedMLP(MLP):
    """hidden x = silu(gate x) * up x. gate and up are two linears, or the rows [gate | up] of one, `gate_up`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fused = config.fused
        if config.fused:
            self.gate_up = Linear(config.dim, 2 * config.ffn_dim, bias=config.mlp_bias)
        else:
            self.gate = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
            self.up = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those together that are computed in one call."""
        inputs = [(self.gate_up,)] if self.fused else calls(self.gate, self.up)
        return [*inputs, (self.down,)]

    def hidden(self, x: Tensor, seed: Tensor | None) -> Tensor:
        if self.fused:
            return swiglu_packed(self.gate_up(x, seed), reuse=True)
        return swiglu(*linears(x, self.gate, self.up, seed=seed), reuse=True)


class Block(Layer):
    """x + Attn(norm x), then x + MLP(norm x); each norm may carry an MMA adapter.

    `recompute_mlp` computes the second half again.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__(config, index)
        self.mlp_norm = Norm(config.dim, config.norm_eps, bias=config.norm_bias)
        self.mlp = GatedMLP(config)
        self.mlp_adapter: MMAdapter | None = None

    def groups(self) -> list[tuple[Linear, ...]]:
        return [*self.attention.groups(), *self.mlp.groups()]

    def add_adapters(self, first: MMAdapter, second: MMAdapter | None) -> None:
        self.attention_adapter = first
        if second is not None:
            self.mlp_adapter = second

    def forward(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, delta [T, D] -> x, delta [T, D]"""
        seed = context.seed
        if self.policy == "keep_input" and cache is None:
            body = partial(self._to_hidden, context=context)
            x, delta = recomputed(body, self.mlp.down, x, delta, self.parameters(), seed)
        elif self.policy == "recompute_mlp" and cache is None and not self._routed_early():
            x, delta = self._attend(x, delta, context, None)
            body = partial(self._mlp_to_hidden, context=context)
            x, delta = recomputed(body, self.mlp.down, x, delta, self._mlp_parameters(), seed)
        else:
            x, delta = self._attend(x, delta, context, cache)
            _, x, hidden = self._mlp_to_hidden(x, delta, context, cache)
            delta = self.mlp.down(hidden, seed)
        return x, self._branch(delta, context, 1)

    def _attend(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """The first half: the stream that enters and what attention adds to it, [T, D] each."""
        x, h = self._norm(x, delta, self.attention_norm, self.attention_adapter, context, cache)
        return x, self._branch(self.attention(h, context, cache), context, 0)

    def _mlp_to_hidden(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, ...]:
        """The second half up to its last product: the stream that enters [T, D], the same as it leaves, and [T, F]."""
        early = self._routed_early()
        x, h = self._norm(x, delta, self.mlp_norm, self.mlp_adapter, context, cache, early=early)
        return x, x, self.mlp.hidden(h, context.seed)

    def _to_hidden(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """Both: the stream that enters [T, D], the one that leaves, and [T, F]."""
        x, delta = self._attend(x, delta, context, None)
        return x, *self._mlp_to_hidden(x, delta, context)[1:]

    def _mlp_parameters(self) -> Iterator[nn.Parameter]:
        for part in (self.mlp_norm, self.mlp_adapter, self.mlp):
            if part is not None:
                yield from part.parameters()

    def _routed_early(self) -> bool:
        """Whether the MLP's adapter reads the stream before attention, which a recomputation of the MLP has not."""
        return self.legacy_routing and not self.training
