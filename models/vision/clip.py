"""OpenAI CLIP's vision tower (arXiv 2103.00020): patches and a class token, LayerNorm before, QuickGELU MLP.

LaVIN looks at the class token's residual stream after six evenly spaced blocks (4, 8, ..., 24 of ViT-L/14), raw: the
tower's last norm and projection are neither run nor kept. `N` tiles of `P` = patches + 1 tokens, width `W`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.activation import bias_act
from kernels.attention import varlen_attention
from models.adapters.mma import AdapterConfig, MMAdapter, PlainAdapter
from models.linear import Linear, linears
from models.norm import Norm
from models.recompute import Policy, recomputed

NUM_TAPS = 6  # image tokens: one for each block whose class token is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """The shape of a CLIP vision tower; the defaults are ViT-L/14 at 224 pixels."""

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    mlp_dim: int = 4096
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_layers < NUM_TAPS:
            raise ValueError(f"a tower of {self.num_layers} blocks: at least {NUM_TAPS} are needed, one an image token")

    @property
    def num_tokens(self) -> int:
        """Tokens of a tile: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def taps(self) -> list[int]:
        """Number of blocks run when each of the image tokens is taken: 4, 8, ..., 24 for 24 blocks."""
        return [self.num_layers * (i + 1) // NUM_TAPS for i in range(NUM_TAPS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all layers of one forward pass share."""

    cu_seqlens: Tensor  # int32 [N + 1], multiples of P
    num_tokens: int  # P
    router: Tensor | None  # int64 [N * P]: which row routes each row; None: its own
    seed: Tensor | None  # int64 [1]: dropout is on; None: off


class Attention(nn.Module):
    """Attention among all tokens of a tile."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.num_heads
        self.q = Linear(config.width, config.width, bias=True)
        self.k = Linear(config.width, config.width, bias=True)
        self.v = Linear(config.width, config.width, bias=True)
        self.o = Linear(config.width, config.width, bias=True)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # [N * P, W] -> [N * P, W]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in linears(x, self.q, self.k, self.v))
        out = varlen_attention(q, k, v, context.cu_seqlens, context.num_tokens, causal=False)
        return self.o(out.flatten(1))


class MLP(nn.Module):
    """down(hidden x), hidden x = quick_gelu(up x), quick_gelu(x) = x sigmoid(1.702 x)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_dim, bias=True)
        self.down = Linear(config.mlp_dim, config.width, bias=True)

    def hidden(self, x: Tensor) -> Tensor:  # [N * P, W] -> [N * P, mlp_dim]
        return bias_act(self.up.product(x), self.up.bias, "quick_gelu", reuse=True)


class Block(nn.Module):
    """x + Attn(norm x), then x + MLP(norm x); each norm may carry an adapter.

    The stream is x + delta, as in models/language/llama.py.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.policy: Policy = "save_all"  # what is kept for the backward pass
        self.attention_norm = Norm(config.width, config.norm_eps, bias=True)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config.width, config.norm_eps, bias=True)
        self.mlp = MLP(config)
        self.attention_adapter: MMAdapter | PlainAdapter | None = None
        self.mlp_adapter: MMAdapter | None = None

    def forward(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """x, delta [N * P, W] -> x, delta [N * P, W]"""
        if self.policy == "keep_input":
            body = partial(self._to_hidden, context=context)
            x, delta = recomputed(body, self.mlp.down, x, delta, self.parameters())
        elif self.policy == "recompute_mlp":
            x, delta = self._attend(x, delta, context)
            body = partial(self._mlp_to_hidden, context=context)
            x, delta = recomputed(body, self.mlp.down, x, delta, self._mlp_parameters())
        else:
            x, delta = self._attend(x, delta, context)
            _, x, hidden = self._mlp_to_hidden(x, delta, context)
            delta = self.mlp.down(hidden)
        return x, delta

    def _attend(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """The first half: the stream that enters and what attention adds to it, [N * P, W] each."""
        x, h = _norm(x, delta, self.attention_norm, self.attention_adapter, context)
        return x, self.attention(h, context)

    def _mlp_to_hidden(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """The second half up to its last product: the stream that enters [N * P, W], the same as it leaves, and
        [N * P, mlp_dim]."""
        x, h = _norm(x, delta, self.mlp_norm, self.mlp_adapter, context)
        return x, x, self.mlp.hidden(h)

    def _to_hidden(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, ...]:
        """Both: the stream that enters [N * P, W], the one that leaves, and [N * P, mlp_dim]."""
        x, delta = self._attend(x, delta, context)
        return x, *self._mlp_to_hidden(x, delta, context)[1:]

    def _mlp_parameters(self) -> Iterator[nn.Parameter]:
        for part in (self.mlp_norm, self.mlp_adapter, self.mlp):
            if part is not None:
                yield from part.parameters()


def _norm(
    x: Tensor, delta: Tensor | None, norm: Norm, adapter: MMAdapter | PlainAdapter | None, context: Context
) -> tuple[Tensor, Tensor]:
    if adapter is None:
        return norm.add(x, delta)
    if isinstance(adapter, PlainAdapter):
        return adapter(norm, x, delta, context.seed)
    x, mix = adapter.mix_all(norm, x, delta)
    return adapter(norm, x, None, mix, context.router, context.seed)


class ClipVision(nn.Module):
    """The tower: tiles [N, 3, H, W] -> image tokens [N, 6, width], in the dtype of `patch_embed`.

    LaVIN keeps LayerNorms, class and position embedding in fp32 beside 16-bit linears, and so does this tower.
    """

    keeps_fp32 = True  # class_embedding and position_embedding: the tower's own, beside its modules

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.pre_norm = Norm(config.width, config.norm_eps, bias=True)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def add_adapters(self, config: AdapterConfig, placement: str, first_site: int, *, legacy_normal: bool) -> None:
        """`router`: an MMA adapter after each attention norm; `router_block`: after each MLP norm too; `normal`: one
        without a router after each attention norm."""
        for i, layer in enumerate(self.blocks()):
            if placement == "normal":
                layer.attention_adapter = PlainAdapter(
                    self.config.width, config, first_site + 2 * i, legacy=legacy_normal
                )
                continue
            layer.attention_adapter = MMAdapter(self.config.width, config, first_site + 2 * i)
            if placement == "router_block":
                layer.mlp_adapter = MMAdapter(self.config.width, config, first_site + 2 * i + 1)

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, tiles: Tensor, tile_router: Tensor | None, seed: Tensor | None) -> Tensor:
        """tiles fp32 [N, 3, H, W] -> [N, 6, width]; `tile_router` int64 [N] names the tile that routes each tile's
        adapters, token by token (None: each tile itself)."""
        num_tiles, tokens = tiles.shape[0], self.config.num_tokens
        dtype = self.patch_embed.weight.dtype
        patches = F.conv2d(tiles.to(dtype), self.patch_embed.weight, stride=self.config.patch_size)  # [N, W, h, w]
        patches = patches.flatten(2).transpose(1, 2)  # [N, P - 1, W]
        first = self.class_embedding.expand(num_tiles, 1, -1)
        x = torch.cat((first, patches), dim=1) + self.position_embedding  # fp32, and rounded once
        x = self.pre_norm(x.flatten(0, 1).to(dtype))  # [N * P, W]
        offsets = torch.arange(tokens, device=x.device)
        context = Context(
            cu_seqlens=torch.arange(0, (num_tiles + 1) * tokens, tokens, dtype=torch.int32, device=x.device),
            num_tokens=tokens,
            router=None if tile_router is None else (tile_router[:, None] * tokens + offsets).flatten(),
            seed=seed,
        )
        taken = []
        delta: Tensor | None = None
        for done, layer in enumerate(self.blocks(), start=1):
            x, delta = layer(x, delta, context)
            if done in self.config.taps:
                x, delta = x + delta, None
                taken.append(x[::tokens])  # the class tokens, [N, W]
        return torch.stack(taken, dim=1)
