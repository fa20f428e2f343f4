"""What the blocks of all families share: norms that may carry an MMA adapter, and what becomes of a branch in training.

A block leaves its last addition to the norm of the next one, which adds and normalises in one pass: the residual
stream is x + delta, with delta None before the first block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from kernels.dropout import keep_mask
from kernels.dropped_sum import dropped_sum
from models.adapters.mma import MMAdapter
from models.cache import LayerCache
from models.language.attention import Attention, Context
from models.language.config import DecoderConfig
from models.linear import Linear
from models.norm import Norm
from models.recompute import Policy

DROP_PATH_SITE = 1 << 16  # above every adapter's site
RESIDUAL_SITE = 1 << 17  # of residual dropout: two a layer


class Layer(nn.Module, ABC):
    """One block. `policy` says what it keeps for the backward pass; `drop_path` and `legacy_routing` are LaVIN's."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.policy: Policy = "save_all"
        self.residual_dropout = config.residual_dropout
        self.drop_path = 0.0  # probability that a segment skips a branch in training
        self.legacy_routing = False  # evaluate as LaVIN: the MLP adapter is routed by the stream before attention
        self.attention_norm = Norm(config.dim, config.norm_eps, bias=config.norm_bias)
        self.attention = Attention(config)
        self.attention_adapter: MMAdapter | None = None

    @abstractmethod
    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those together that are computed in one call (so their packed weights are unpacked together)."""

    @abstractmethod
    def add_adapters(self, first: MMAdapter, second: MMAdapter | None) -> None:
        """Puts an MMA adapter after the attention norm, and one after the MLP norm.

        Raises:
            ValueError: there is no MLP norm.
        """

    @abstractmethod
    def forward(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, delta [T, D] -> x, delta [T, D]"""

    def _norm(
        self, x: Tensor, delta: Tensor | None, norm: Norm, adapter: MMAdapter | None, context: Context,
        cache: LayerCache | None, *, early: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The stream x + delta and its norm, adapted; `early`: routed by x alone."""
        if adapter is None:
            return norm.add(x, delta)
        row, seed = context.segments.router_row, context.seed
        if context.router_rows is None:
            assert cache is not None
            return adapter(norm, x, delta, cache.mix[adapter.site], row, seed)
        if cache is None and not early:
            return adapter(norm, x, delta, adapter.routed_by(context.router_rows), row, seed, as_sum=True)
        routing = x if delta is None or early else x + delta
        mix = adapter.mix(norm, routing.index_select(0, context.router_rows))  # [R, 2]
        if cache is not None:
            cache.mix[adapter.site] = mix
        return adapter(norm, x, delta, mix, row, seed)

    def _branch(self, branch: Tensor, context: Context, which: int) -> Tensor:
        """What a branch [T, D] adds to the stream: it went through residual dropout and drop path."""
        site = RESIDUAL_SITE + 2 * self.index + which
        branch = dropped_sum(branch, None, dropout=self.residual_dropout, seed=context.seed, site=site)
        return self._drop_path(branch, context, which)

    def _drop_path(self, branch: Tensor, context: Context, which: int) -> Tensor:
        if self.drop_path == 0.0 or context.seed is None:
            return branch
        assert context.segment_of is not None
        num_segments = context.segments.cu_seqlens.numel() - 1
        site = DROP_PATH_SITE + 2 * self.index + which
        keep = keep_mask(context.seed, site, num_segments, 1, self.drop_path, branch.device)  # [S, 1]
        return branch * (keep[context.segment_of] / (1 - self.drop_path)).to(branch.dtype)
