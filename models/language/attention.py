"""Causal attention of packed tokens, for all families: grouped queries, part of a head turning, biases, a window.

`H` heads, `G` key/value heads, `d` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.attention import varlen_attention
from kernels.rope import rope
from models.cache import LayerCache
from models.language.config import DecoderConfig
from models.linear import Linear, calls, linears
from models.pack import Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all layers of one forward pass share."""

    segments: Segments
    router_rows: Tensor | None  # int64 [R], rows of x whose norm routes; None at decode, where the cache has the mix
    rope: tuple[Tensor, Tensor]  # cos, sin, fp32 [P, r / 2] for r channels of a head that turn
    seed: Tensor | None  # int64 [1]: dropout and drop path are on; None: off
    segment_of: Tensor | None = None  # int32 [T], only for drop path


class Attention(nn.Module):
    """Attention within segments. q, k, v are three linears, or the rows [q | k | v] of one, `qkv`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.interleaved, self.window, self.fused = config.rope_interleaved, config.window, config.fused
        if config.fused:
            self.qkv = Linear(config.dim, config.dim + 2 * config.kv_dim, bias=config.qkv_bias)
        else:
            self.q = Linear(config.dim, config.dim, bias=config.qkv_bias)
            self.k = Linear(config.dim, config.kv_dim, bias=config.qkv_bias)
            self.v = Linear(config.dim, config.kv_dim, bias=config.qkv_bias)
        self.o = Linear(config.dim, config.dim, bias=config.o_bias)

    def groups(self) -> list[tuple[Linear, ...]]:
        """The linears, those together that are computed in one call."""
        inputs = [(self.qkv,)] if self.fused else calls(self.q, self.k, self.v)
        return [*inputs, (self.o,)]

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:  # [T, D] -> [T, D]
        return self.o(self.head_outputs(x, context, cache), context.seed)

    def head_outputs(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """Side by side, as `o` reads them: [T, D] -> [T, D]."""
        segments = context.segments
        q, k, v = self._heads(x, context)
        if cache is not None and cache.decoding:
            out = cache.attend(q, k, v, self.window)
        else:
            if cache is not None:
                cache.fill(k, v)
            out = varlen_attention(
                q, k, v, segments.cu_seqlens, segments.max_seqlen, causal=True, window=self.window
            )  # fmt: skip
        return out.flatten(1)

    def _heads(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> q [T, H, d] and k [T, G, d], turned, and v [T, G, d]."""
        positions = context.segments.position_ids
        if self.fused:
            qkv = self.qkv(x, context.seed).unflatten(-1, (-1, self.head_dim))
            heads = _TurnedParts.apply(qkv, *context.rope, positions, self.num_kv_heads, self.interleaved)  # type: ignore[no-untyped-call]
            return cast(tuple[Tensor, Tensor, Tensor], heads)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in linears(x, self.q, self.k, self.v, seed=context.seed)
        )  # fmt: skip
        return *rope(q, k, *context.rope, positions, interleaved=self.interleaved, inplace=True), v


class _TurnedParts(torch.autograd.Function):
    """The parts q, k, v of one buffer [T, H + 2 G, d], which nobody else needs: q and k turned where they lie.

    rope alone, on slices that autograd knows, would give the buffer's gradient in two copies of it for each slice.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, groups: int, interleaved: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.groups, ctx.interleaved = groups, interleaved
        q, k, v = _parts(qkv, groups)
        rope(q, k, cos, sin, position_ids, interleaved=interleaved, inplace=True)
        return q.detach(), k.detach(), v.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        gradient = torch.cat((dq, dk, dv), dim=1)
        first, second, _ = _parts(gradient, ctx.groups)
        rope(first, second, cos, -sin, position_ids, interleaved=ctx.interleaved, inplace=True)
        return gradient, None, None, None, None, None


def _parts(qkv: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, H, d], [T, G, d], [T, G, d] of [T, H + 2 G, d]."""
    return qkv[:, : -2 * groups], qkv[:, -2 * groups : -groups], qkv[:, -groups:]
