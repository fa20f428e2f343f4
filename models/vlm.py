"""The joint model, of any tower, projector and language model: spliced embeddings, blocks, loss.

    x = embed(ids); x[image slots] = projector(tower(tiles)) (and image_newline), by the pack's image_rows
    x[modality rows] = modality embedding      LaVIN's (arXiv 2305.15023), where the language model has MMA adapters
    x = blocks(x); loss = sum_i weights_i * cross_entropy(head(norm(x[supervised_i])), labels_i)

The weights of a step's packs sum to one over the step, so gradients simply add up over packs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy
from models.adapters.lora import LoRA, LoRAConfig
from models.adapters.mma import AdapterConfig, MMAdapter, PlainAdapter
from models.adapters.names import is_adapter
from models.cache import KVCache
from models.embedding import Embedding
from models.language.decoder import Context, Decoder, DecoderConfig
from models.pack import Pack, Segments
from models.projector import ProjectorConfig, make_projector
from models.recompute import ActivationPolicy, check_policy
from models.vision.tower import TowerConfig, make_tower

Part = Literal["frozen", "mma", "lora", "full"]
VISION_SITE = 1 << 12  # dropout sites of the tower's MMA adapters start here; the language model's start at 0
LORA_SITE, VISION_LORA_SITE = 1 << 18, 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Legacy:
    """Behaviour of the original that changes numbers and is off unless asked for."""

    clip_router: bool = False  # the tower's adapters are routed by the first sample of the micro-batch
    normal_adapter: bool = False  # `normal` adapters have neither residual nor scale
    block_routing: bool = False  # the MLP adapter is routed by the norm of the stream before attention


@dataclass(frozen=True, slots=True, kw_only=True)
class VLMConfig:
    """Shapes, placements and what trains."""

    language: DecoderConfig
    vision: TowerConfig
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # of the language model
    vision_lora: LoRAConfig = field(default_factory=LoRAConfig)
    language_placement: Literal["attn", "block"] = "attn"
    vision_placement: Literal["normal", "router", "router_block"] = "router"
    train_language: Part = "mma"
    train_vision: Part = "mma"
    train_projector: Literal["frozen", "full"] = "full"
    image_newline: bool = False  # an embedding that ends each row of an image's patches; it learns with the projector
    drop_path: float = 0.0
    legacy: Legacy = field(default_factory=Legacy)

    @property
    def tokens_per_tile(self) -> int:
        """Embeddings K' that the projector makes of one tile."""
        return self.projector.tokens(self.vision.tokens_out)

    @property
    def has_modality_token(self) -> bool:
        """Whether packs carry LaVIN's two modality tokens: they route MMA adapters and do nothing else."""
        return self.train_language == "mma"


class VisionLanguageModel(nn.Module):
    """`forward` gives a pack's share of the step's loss; `hidden` and `logits` serve evaluation and generation."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.language.dim
        self.language = Decoder(config.language)
        self.vision = make_tower(config.vision)
        self.projector = make_projector(config.projector, config.vision.feature_width, dim)
        self.modality_embedding = Embedding(2, dim) if config.has_modality_token else None
        self.image_newline = nn.Parameter(torch.empty(dim)) if config.image_newline else None
        self._add_adapters(config)
        for block in self.language.blocks():
            block.drop_path = config.drop_path
            block.legacy_routing = config.legacy.block_routing
        self._ropes: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}  # kept: CUDA graphs read them
        self._mark_trainable()

    def _add_adapters(self, config: VLMConfig) -> None:
        if config.train_language == "mma":
            self.language.add_adapters(config.adapter, config.language_placement, 0)
        elif config.train_language == "lora":
            self.language.add_lora(config.lora, LORA_SITE)
        if config.train_vision == "mma":
            self.vision.add_adapters(
                config.adapter, config.vision_placement, VISION_SITE, legacy_normal=config.legacy.normal_adapter
            )
        elif config.train_vision == "lora":
            self.vision.add_lora(config.vision_lora, VISION_LORA_SITE)

    def _mark_trainable(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_trainable(name))

    def is_trainable(self, name: str) -> bool:
        """Whether the tensor of this name learns under this configuration."""
        part = name.split(".", 1)[0]
        if part == "modality_embedding":
            return True
        if part in ("projector", "image_newline"):
            return self.config.train_projector == "full"
        train = self.config.train_language if part == "language" else self.config.train_vision
        return train == "full" or is_adapter(name)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def start_trainable(self, seed: int, device: torch.device) -> None:
        """Fresh fp32 adapters, projector, modality embedding and image_newline on `device`: the same numbers for one
        seed everywhere.

        What base files fill (tensors on the meta device that `placement.fill` expects) is left alone.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in (*self._adapters(), self.projector):
                module.to_empty(device="cpu")
                module.reset()
            if self.modality_embedding is not None:
                self.modality_embedding.to_empty(device="cpu")
                nn.init.normal_(self.modality_embedding.weight)
            if self.image_newline is not None:  # LLaVA-NeXT's start
                dim = self.config.language.dim
                self.image_newline = nn.Parameter((torch.randn(dim) / dim**0.5).to(device))
        for part in (*self._adapters(), self.projector, self.modality_embedding):
            if part is not None:
                part.to(device)
        self._mark_trainable()

    @property
    def activation_policy(self) -> ActivationPolicy:
        """What each layer keeps for its backward pass; at first all that it needs."""
        language, vision = self.language.blocks(), self.vision.blocks()
        return ActivationPolicy(tuple(block.policy for block in language), tuple(block.policy for block in vision))

    def use_activation_policy(self, policy: ActivationPolicy) -> None:
        """From now on layers keep what `policy` says.

        Raises:
            ValueError: it is for another number of layers.
        """
        language, vision = self.language.blocks(), self.vision.blocks()
        if (len(policy.language), len(policy.vision)) != (len(language), len(vision)):
            raise ValueError(
                f"the policy {policy.describe()} is for another model than one of {len(language)} layers and a tower "
                f"of {len(vision)}"
            )
        for block, chosen in zip(language, policy.language, strict=True):
            block.policy = check_policy(chosen)
        for tower_block, chosen in zip(vision, policy.vision, strict=True):
            tower_block.policy = check_policy(chosen)

    def _adapters(self) -> list[MMAdapter | PlainAdapter | LoRA]:
        return [module for module in self.modules() if isinstance(module, MMAdapter | PlainAdapter | LoRA)]

    def image_tokens(self, pack: Pack, seed: Tensor | None) -> Tensor | None:
        """Embeddings [I, D] of the pack's image slots, from tiles or from features that the tower gave before."""
        features = pack.features
        if pack.tiles is not None:
            features = self.vision(pack.tiles, pack.tile_router if self.config.legacy.clip_router else None, seed)
        if features is None:
            return None
        if pack.image_rows is None:
            num_tiles = pack.image_slots.numel() // self.config.tokens_per_tile
            return self.projector(features[:num_tiles]).flatten(0, 1)
        return self._arranged(self.projector(features).flatten(0, 1), pack.image_rows)

    def _arranged(self, tiles: Tensor, rows: Tensor) -> Tensor:
        """tiles [N * K', D], rows int64 [I] of (tiles, image_newline) -> [I, D].

        image_newline is not one more row of a table that is read: its gradient would be a sum in the stream's dtype, in
        any order.
        """
        if self.image_newline is None:
            return tiles.index_select(0, rows)
        is_newline = (rows == tiles.shape[0]).unsqueeze(1)
        tokens = tiles.index_select(0, rows.clamp(max=tiles.shape[0] - 1))
        return torch.where(is_newline, self.image_newline.to(tiles.dtype), tokens)

    def embed(self, pack: Pack, seed: Tensor | None) -> Tensor:
        """Token, image and modality embeddings in place: [T, D]."""
        x = self.language.embed(pack.input_ids)
        image = self.image_tokens(pack, seed)
        if image is not None:
            x = x.index_copy(0, pack.image_slots, image.to(x.dtype))
        if self.modality_embedding is not None:
            x = x.index_copy(0, pack.modality_rows, self.modality_embedding.weight.to(x.dtype))
        return x

    def blocks(
        self, x: Tensor, segments: Segments, router_rows: Tensor | None, seed: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The language model's blocks on embeddings x [T, D] -> the residual stream in two parts, their sum."""
        context = Context(
            segments=segments,
            router_rows=router_rows,
            rope=self._rope_table(segments.max_seqlen if cache is None else cache.max_length, x.device),
            seed=seed,
            segment_of=self._segment_of(segments) if self.config.drop_path > 0 and seed is not None else None,
        )
        delta: Tensor | None = None
        for i, layer in enumerate(self.language.blocks()):
            x, delta = layer(x, delta, context, None if cache is None else cache.layers[i])
        return x, delta

    def hidden(self, pack: Pack, seed: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last block, [T, D]. `seed` int64 [1] switches dropout on."""
        return _sum(*self.blocks(self.embed(pack, seed), pack.segments, pack.modality_rows, seed, cache))

    def decode(self, tokens: Tensor, position_ids: Tensor, router_row: Tensor, cache: KVCache) -> Tensor:
        """One more token for each of B sequences: tokens int64 [B], positions and router rows int32 [B] -> the
        residual stream [B, D]. A modality token was seen by the prefill; the cache kept what its router decided."""
        segments = Segments(
            cu_seqlens=torch.arange(tokens.numel() + 1, dtype=torch.int32, device=tokens.device),
            max_seqlen=1,
            position_ids=position_ids,
            router_row=router_row,
        )
        x, delta = self.blocks(self.language.embed(tokens), segments, None, None, cache)
        cache.lengths += 1
        return _sum(x, delta)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of the residual stream [L, D] -> logits fp32 [L, V]."""
        return self.language.head(self.language.norm(hidden)).float()

    def forward(self, pack: Pack, seed: Tensor | None = None) -> Tensor:
        """This pack's share of the step's loss, fp32 scalar."""
        parts = self.blocks(self.embed(pack, seed), pack.segments, pack.modality_rows, seed, None)
        x, delta = (None if part is None else part.index_select(0, pack.supervised) for part in parts)  # [L, D]
        assert x is not None
        _, rows = self.language.norm.add(x, delta)
        head = self.language.head
        loss = linear_cross_entropy(rows, head.frozen_weight(), pack.labels, pack.weights, bias=head.bias)
        return loss if loss.requires_grad or not torch.is_grad_enabled() else loss + self._nothing()

    def _nothing(self) -> Tensor:
        """0, as a function of something that learns: a pack without images has a backward pass too where the language
        model is frozen."""
        learns = (p for p in (*self.projector.parameters(), *self.parameters()) if p.requires_grad)
        return next(learns, self.language.embed.weight).flatten()[:0].sum()

    def _rope_table(self, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions = max(2048, 1 << longest.bit_length())  # more than `longest`
        if (device, positions) not in self._ropes:
            self._ropes[device, positions] = self.language.rope_table(positions, device)
        return self._ropes[device, positions]

    @staticmethod
    def _segment_of(segments: Segments) -> Tensor:  # int32 [T]: which segment each token is in
        return torch.repeat_interleave(segments.cu_seqlens.diff(), output_size=segments.position_ids.numel())


def _sum(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else x + delta
