"""A vision tower: tiles in, the tokens that the projector reads out. `N` tiles of `P` tokens, width `W`, `K` out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters.lora import LoRAConfig, add_lora
from models.adapters.mma import AdapterConfig, MMAdapter, PlainAdapter
from models.norm import Norm
from models.vision.block import Block, Context
from models.vision.config import SelectFeature, TowerConfig
from models.vision.s2 import crops, joined, rows_of_crops

__all__ = ["Block", "Context", "SelectFeature", "Tower", "TowerConfig", "make_tower"]


class Tower(nn.Module):
    """Tiles [N, 3, H, W] -> tokens [N, K, feature_width] of the residual stream, raw, in the dtype of `patch_embed`.

    Blocks behind the last that is selected, last norm and pooling head are neither run nor held. As in LaVIN,
    LayerNorms, class and position embedding stay in fp32 beside 16-bit linears.
    """

    keeps_fp32 = True  # class_embedding and position_embedding: the tower's own, beside its modules

    def __init__(self, config: TowerConfig, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=config.has_patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width)) if config.has_class_token else None
        self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, width))
        self.pre_norm = Norm(width, config.norm_eps, bias=True) if config.has_pre_norm else None
        self.layers = nn.ModuleList(blocks)
        self._tables: dict[torch.device, tuple[Tensor, Tensor] | None] = {}  # kept: CUDA graphs read them

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

    def add_lora(self, config: LoRAConfig, first_site: int) -> None:
        """Gives the linears of the blocks that `config.targets` names (all of them where it is empty) an update.

        Raises:
            ValueError: a target is the name of no linear.
        """
        add_lora(self.blocks(), config, first_site)

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, tiles: Tensor, tile_router: Tensor | None, seed: Tensor | None) -> Tensor:
        """tiles fp32 [N, 3, H, W] -> [N, K, feature_width]; `tile_router` int64 [N] names the tile that routes each
        tile's adapters, token by token (None: each tile itself); `seed` int64 [1] switches dropout on."""
        config = self.config
        if not config.scales:
            return self._features(tiles, tile_router, seed)
        router = None if tile_router is None else rows_of_crops(tile_router, config)
        return joined(self._features(crops(tiles, config), router, seed), config)

    def _features(self, tiles: Tensor, tile_router: Tensor | None, seed: Tensor | None) -> Tensor:
        """tiles [N, 3, image_size, image_size] -> [N, K, width]"""
        x = self._embed(tiles)
        context = self._context(tiles.shape[0], tile_router, seed, x.device)
        if self.config.select_feature == "class_tokens":
            return self._class_tokens(x, context)
        delta: Tensor | None = None
        for layer in self.blocks():
            x, delta = layer(x, delta, context)
        return self._selected(x, delta)

    def _embed(self, tiles: Tensor) -> Tensor:
        """tiles [N, 3, H, W] -> the stream that enters the blocks, [N * P, width]."""
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        patches = F.conv2d(tiles.to(weight.dtype), weight, bias, stride=self.config.patch_size)  # [N, W, grid, grid]
        patches = patches.flatten(2).transpose(1, 2)  # [N, grid^2, W]
        if self.class_embedding is not None:
            first = self.class_embedding.expand(patches.shape[0], 1, -1)
            patches = torch.cat((first, patches), dim=1)
        x = self.position_embedding + patches  # fp32, rounded once; row-major, as the table is
        x = x.flatten(0, 1).to(weight.dtype)
        return x if self.pre_norm is None else self.pre_norm(x)

    def _context(self, tiles: int, tile_router: Tensor | None, seed: Tensor | None, device: torch.device) -> Context:
        tokens = self.config.num_tokens
        return Context(
            cu_seqlens=torch.arange(0, (tiles + 1) * tokens, tokens, dtype=torch.int32, device=device),
            num_tokens=tokens,
            router=None if tile_router is None else self._rows(tile_router),
            seed=seed,
            rope=self._rope(tiles, device),
        )

    def _rows(self, tiles: Tensor) -> Tensor:
        """The rows of these tiles, int64 [N] -> [N * P]."""
        tokens = self.config.num_tokens
        return (tiles[:, None] * tokens + torch.arange(tokens, device=tiles.device)).flatten()

    def _rope(self, tiles: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
        if device not in self._tables:
            self._tables[device] = self.config.rope_table(device)
        table = self._tables[device]
        if table is None:
            return None
        return *table, torch.arange(self.config.num_tokens, dtype=torch.int32, device=device).repeat(tiles)

    def _class_tokens(self, x: Tensor, context: Context) -> Tensor:
        """LaVIN's features: the class tokens of the stream after the blocks of `config.taps`, [N, 6, width]."""
        taken = []
        delta: Tensor | None = None
        for done, layer in enumerate(self.blocks(), start=1):
            x, delta = layer(x, delta, context)
            if done in self.config.taps:
                x, delta = x + delta, None
                taken.append(x[:: self.config.num_tokens])  # [N, W]
        return torch.stack(taken, dim=1)

    def _selected(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """The tokens of x + delta [N * P, width] that leave, [N, K, width], contiguous."""
        tokens, dropped = self.config.num_tokens, self.config.num_tokens - self.config.tokens_out
        kept = x.unflatten(0, (-1, tokens))[:, dropped:]
        return kept.contiguous() if delta is None else kept + delta.unflatten(0, (-1, tokens))[:, dropped:]


def make_tower(config: TowerConfig) -> Tower:
    """The tower of this shape, with the `config.layers_run` blocks that are on the way to what is selected."""
    return Tower(config, (Block(config, *config.parts()) for _ in range(config.layers_run)))
