"""LLaMA-1/2 (arXiv 2302.13971) on packed tokens: RMSNorm before, RoPE, SwiGLU, no biases, untied head.

RoPE is in Meta's convention: a head's channels 2i and 2i + 1 are one complex number. Files in Hugging Face's
half-split order are brought into this order when they are read. `H` heads, `G` key/value heads, `d` head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kernels.attention import varlen_attention
from kernels.dropout import keep_mask
from kernels.rope import rope, rope_table
from kernels.swiglu import swiglu
from models.adapters.mma import AdapterConfig, MMAdapter
from models.cache import LayerCache
from models.embedding import Embedding
from models.linear import Linear, linears
from models.norm import Norm
from models.pack import Segments
from models.recompute import Policy, recomputed


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The shape of a LLaMA model."""

    vocab_size: int = 32000
    dim: int = 4096  # width D of the residual stream
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_dim: int = 11008  # width F of the MLP
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all layers of one forward pass share."""

    segments: Segments
    router_rows: Tensor | None  # int64 [R], rows of x whose norm routes; None at decode, where the cache has the mix
    rope: tuple[Tensor, Tensor]  # cos, sin, fp32 [P, d / 2]
    seed: Tensor | None  # int64 [1]: dropout and drop path are on; None: off
    segment_of: Tensor | None = None  # int32 [T], only for drop path


class Attention(nn.Module):
    """Causal attention within segments, grouped-query."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, kv_dim)
        self.v = Linear(config.dim, kv_dim)
        self.o = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:  # [T, D] -> [T, D]
        segments = context.segments
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in linears(x, self.q, self.k, self.v))
        q, k = rope(q, k, *context.rope, segments.position_ids, interleaved=True, inplace=True)
        if cache is not None and cache.decoding:
            out = cache.attend(q, k, v)
        else:
            if cache is not None:
                cache.fill(k, v)
            out = varlen_attention(q, k, v, segments.cu_seqlens, segments.max_seqlen, causal=True)
        return self.o(out.flatten(1))


class MLP(nn.Module):
    """down(hidden x), hidden x = silu(gate x) * up x."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim)
        self.up = Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def hidden(self, x: Tensor) -> Tensor:  # [T, D] -> [T, F]
        return swiglu(*linears(x, self.gate, self.up), reuse=True)


class Block(nn.Module):
    """x + Attn(norm x), then x + MLP(norm x); each norm may carry an MMA adapter.

    A block leaves its last addition to the norm of the next one, which adds and normalises in one pass: the residual
    stream is x + delta, with delta None before the first block.
    """

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.policy: Policy = "save_all"  # what is kept for the backward pass
        self.drop_path = 0.0  # probability that a segment skips a branch in training
        self.legacy_routing = False  # evaluate as LaVIN: the MLP adapter is routed by the stream before attention
        self.attention_norm = Norm(config.dim, config.norm_eps, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config.dim, config.norm_eps, bias=False)
        self.mlp = MLP(config)
        self.attention_adapter: MMAdapter | None = None
        self.mlp_adapter: MMAdapter | None = None

    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those that are applied to one x together."""
        attention, mlp = self.attention, self.mlp
        return [(attention.q, attention.k, attention.v), (attention.o,), (mlp.gate, mlp.up), (mlp.down,)]

    def forward(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, delta [T, D] -> x, delta [T, D]"""
        if self.policy == "keep_input" and cache is None:
            body = partial(self._to_hidden, context=context)
            x, delta = recomputed(body, self.mlp.down, x, delta, self.parameters())
        elif self.policy == "recompute_mlp" and cache is None and not self._routed_early():
            x, delta = self._attend(x, delta, context, None)
            body = partial(self._mlp_to_hidden, context=context)
            x, delta = recomputed(body, self.mlp.down, x, delta, self._mlp_parameters())
        else:
            x, delta = self._attend(x, delta, context, cache)
            _, x, hidden = self._mlp_to_hidden(x, delta, context, cache)
            delta = self.mlp.down(hidden)
        return x, self._drop_path(delta, context, 1)

    def _attend(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """The first half: the stream that enters and what attention adds to it, [T, D] each."""
        x, h = self._norm(x, delta, self.attention_norm, self.attention_adapter, context, cache)
        return x, self._drop_path(self.attention(h, context, cache), context, 0)

    def _mlp_to_hidden(
        self, x: Tensor, delta: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, ...]:
        """The second half up to its last product: the stream that enters [T, D], the same as it leaves, and [T, F]."""
        x, h = self._norm(x, delta, self.mlp_norm, self.mlp_adapter, context, cache)
        return x, x, self.mlp.hidden(h)

    def _to_hidden(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """Both: the stream that enters [T, D], the one that leaves, and [T, F]."""
        x, delta = self._attend(x, delta, context, None)
        return x, *self._mlp_to_hidden(x, delta, context)[1:]

    def _mlp_parameters(self) -> Iterator[nn.Parameter]:
        for part in (self.mlp_norm, self.mlp_adapter, self.mlp):
            if part is not None:
                yield from part.parameters()

    def _norm(
        self, x: Tensor, delta: Tensor | None, norm: Norm, adapter: MMAdapter | None, context: Context,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if adapter is None:
            return norm.add(x, delta)
        row, seed = context.segments.router_row, context.seed
        if context.router_rows is None:
            assert cache is not None
            return adapter(norm, x, delta, cache.mix[adapter.site], row, seed)
        before_attention = norm is self.mlp_norm and self._routed_early()
        if cache is None and not before_attention:
            return adapter(norm, x, delta, adapter.routed_by(context.router_rows), row, seed, as_sum=True)
        routing = x if delta is None or before_attention else x + delta
        mix = adapter.mix(norm, routing.index_select(0, context.router_rows))  # [R, 2]
        if cache is not None:
            cache.mix[adapter.site] = mix
        return adapter(norm, x, delta, mix, row, seed)

    def _routed_early(self) -> bool:
        """Whether the MLP's adapter reads the stream before attention, which a recomputation of the MLP has not."""
        return self.legacy_routing and not self.training

    def _drop_path(self, branch: Tensor, context: Context, which: int) -> Tensor:
        if self.drop_path == 0.0 or context.seed is None:
            return branch
        assert context.segment_of is not None
        num_segments = context.segments.cu_seqlens.numel() - 1
        site = DROP_PATH_SITE + 2 * self.index + which
        keep = keep_mask(context.seed, site, num_segments, 1, self.drop_path, branch.device)  # [S, 1]
        return branch * (keep[context.segment_of] / (1 - self.drop_path)).to(branch.dtype)


DROP_PATH_SITE = 1 << 16  # above every adapter's site


class Llama(nn.Module):
    """Embedding, blocks, last norm and head. `hidden` stops before the last norm: only supervised rows need it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = Norm(config.dim, config.norm_eps, bias=False)
        self.head = Linear(config.dim, config.vocab_size)

    def add_adapters(self, config: AdapterConfig, placement: str, first_site: int) -> None:
        """Puts an MMA adapter after each attention norm (`attn`), and after each MLP norm too (`block`)."""
        for i, layer in enumerate(self.blocks()):
            layer.attention_adapter = MMAdapter(self.config.dim, config, first_site + 2 * i)
            if placement == "block":
                layer.mlp_adapter = MMAdapter(self.config.dim, config, first_site + 2 * i + 1)

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def rope_table(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [positions, d / 2], on `device`."""
        cos, sin = rope_table(self.config.head_dim, positions, self.config.rope_theta)
        return cos.to(device), sin.to(device)


LLAMA_7B = LlamaConfig()
LLAMA_13B = LlamaConfig(dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_dim=13824)
