"""The sequential block of LLaMA, Phi-3 and StableLM: norm before, attention, norm, gated MLP."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kernels.swiglu import swiglu, swiglu_packed
from models.adapters.mma import MMAdapter
from models.cache import LayerCache
from models.halves import two_halves
from models.language.attention import Context
from models.language.config import DecoderConfig
from models.language.layer import Layer
from models.linear import Linear, calls, linears
from models.mlp import MLP
from models.norm import Norm
from models.recompute import Policy


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
        first = partial(self._attend, context=context, cache=cache)
        second = partial(self._mlp_to_hidden, context=context, cache=cache)
        x, delta = two_halves(
            self._policy(cache), first, second, self.mlp.down, x, delta, context.seed, whole=self,
            of_second=(self.mlp_norm, self.mlp_adapter, self.mlp),
        )  # fmt: skip
        return x, self._branch(delta, context, 1)

    def _policy(self, cache: LayerCache | None) -> Policy:
        """Beside a cache nothing learns; the MLP alone is not computed again where it needs more than its stream."""
        with_more = self.policy == "recompute_mlp" and self._routed_early()
        return "save_all" if cache is not None or with_more else self.policy

    def _attend(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """The first half: the stream that enters and what attention adds to it, [T, D] each."""
        x, h = self._norm(x, delta, self.attention_norm, self.attention_adapter, context, cache)
        return x, self._branch(self.attention(h, context, cache), context, 0)

    def _mlp_to_hidden(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, ...]:
        """The second half up to its last product: the stream that enters [T, D], the same as it leaves, and [T, F]."""
        early = self._routed_early()
        x, h = self._norm(x, delta, self.mlp_norm, self.mlp_adapter, context, cache, early=early)
        return x, x, self.mlp.hidden(h, context.seed)

    def _routed_early(self) -> bool:
        """Whether the MLP's adapter reads the stream before attention, which a recomputation of the MLP has not."""
        return self.legacy_routing and not self.training
