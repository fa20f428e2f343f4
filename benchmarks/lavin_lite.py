"""LaVIN-lite's model and training loop in plain PyTorch and bitsandbytes, written from a description of what it does.

    model   RMSNorm and softmax in fp32, RoPE in complex numbers, explicit masks and scores, adapters as 1x1
            convolutions under autocast, OpenAI's CLIP layout, attention and MLP recomputed separately, head on every
            token; linears are bitsandbytes' Linear4bit
    loop    one sample a micro-batch, padded to 512; CLIP runs for text too, on a black image; loss scale; the host
            waits for the device several times a micro-step

It holds the weights of a nibble model: packed ones are the same memory, others are cast to its dtype, trained ones are
copied. LaVIN pages its AdamW's state, 30 MB; torch's AdamW does the same updates.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import empty_linear4bit
from benchmarks.trainers import BETAS, LR, WEIGHT_DECAY, pinned
from benchmarks.workload import Workload
from engine.data.sample import IGNORE
from engine.optim import decays
from kernels.nf4 import NF4Tensor
from kernels.nf4_bitsandbytes import to_quant_state
from models.adapters.mma import AdapterConfig, MMAdapter
from models.language.block import Block as NibbleBlock
from models.language.decoder import DecoderConfig
from models.linear import Linear
from models.mlp import PlainMLP
from models.norm import Norm
from models.projectors.mlp import LavinProjector
from models.vision.block import Block as NibbleTowerBlock
from models.vision.tower import Tower as NibbleTower
from models.vlm import VisionLanguageModel

PADDED = 512


class Adapter(nn.Module):
    """The MM-adapter on x [A, B, D], routed by x[:, 0]: the modality token of each sample where A are the samples (the
    language model), each token's own for one image where A are the tokens (CLIP)."""

    def __init__(self, source: MMAdapter) -> None:
        super().__init__()
        self.config: AdapterConfig = source.config
        dim, bottleneck = source.down.in_features, source.config.dim
        self.conv_A = nn.Conv1d(dim, bottleneck, 1)
        self.conv_B = nn.Conv1d(bottleneck, dim, 1, groups=2)
        self.conv_D = nn.Conv1d(bottleneck, dim, 1, groups=2)
        self.expert_weights = nn.Linear(dim, 2)
        self.dropout = nn.Dropout(source.config.dropout)
        pairs = ((self.conv_A, source.down), (self.conv_B, source.up0), (self.conv_D, source.up1))
        for own, theirs in (*pairs, (self.expert_weights, source.router)):
            assert own.bias is not None
            own.weight.data = theirs.weight.detach().clone().reshape(own.weight.shape)
            own.bias.data = theirs.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        with _autocast(x):
            mix = torch.softmax(self.expert_weights(x[:, 0]) / self.config.temperature, dim=-1).to(x.dtype)  # [A, 2]
            code = self.dropout(self.conv_A(x.transpose(1, 2)))
            paths = mix[:, 0, None, None] * self.conv_B(code) + mix[:, 1, None, None] * self.conv_D(code)
            return (x + self.config.scale * paths.transpose(1, 2)).to(x.dtype)


class RMSNorm(nn.Module):
    """Computed in fp32, cast back, then multiplied by the weight."""

    def __init__(self, source: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(source.weight.to(dtype))
        self.eps = source.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Scores of all pairs, with an additive mask."""

    def __init__(self, source: NibbleBlock, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_dim
        attention = source.attention
        self.wq, self.wk, self.wv, self.wo = (
            linear(layer, dtype) for layer in (attention.q, attention.k, attention.v, attention.o)
        )

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.wq, self.wk, self.wv))
        q, k = _rotate(q, angles), _rotate(k, angles)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, S, d]
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5 + mask
        weights = scores.float().softmax(dim=-1).to(x.dtype)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, source: NibbleBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            linear(layer, dtype) for layer in (source.mlp.gate, source.mlp.down, source.mlp.up)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Norms and adapter are outside of what is recomputed."""

    def __init__(self, source: NibbleBlock, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        assert source.attention_adapter is not None
        self.attention_norm, self.ffn_norm = RMSNorm(source.attention_norm, dtype), RMSNorm(source.mlp_norm, dtype)
        self.attention, self.feed_forward = Attention(source, config, dtype), MLP(source, dtype)
        self.adapter_attn = Adapter(source.attention_adapter)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        recompute: Callable[..., Tensor] = partial(checkpoint, use_reentrant=True)
        h = x + recompute(self.attention, self.adapter_attn(self.attention_norm(x)), angles, mask)
        return h + recompute(self.feed_forward, self.ffn_norm(h))


class TowerBlock(nn.Module):
    """A residual block of OpenAI's CLIP on x [P, N, W], with an adapter behind its first norm; no recomputation."""

    def __init__(self, source: NibbleTowerBlock, width: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(source.attention_adapter, MMAdapter) and isinstance(source.mlp, PlainMLP)
        packed = (source.attention.q, source.attention.k, source.attention.v)
        with torch.device("meta"):
            self.attn = nn.MultiheadAttention(width, heads, dtype=dtype)
        self.attn.in_proj_weight = _frozen(torch.cat([_dense(part, dtype) for part in packed]))
        self.attn.in_proj_bias = _frozen(torch.cat([_bias(part, dtype) for part in packed]))
        self.attn.out_proj.weight = _frozen(_dense(source.attention.o, dtype))
        self.attn.out_proj.bias = _frozen(_bias(source.attention.o, dtype))
        self.c_fc, self.c_proj = linear(source.mlp.up, dtype), linear(source.mlp.down, dtype)
        self.ln_1, self.ln_2 = LayerNorm(source.attention_norm), LayerNorm(source.mlp_norm)
        self.adapter_attn = Adapter(source.attention_adapter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.adapter_attn(self.ln_1(x))
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.c_fc(self.ln_2(x))
        return x + self.c_proj(h * torch.sigmoid(1.702 * h))


class LayerNorm(nn.Module):
    """In fp32, weights too."""

    def __init__(self, source: Norm) -> None:
        super().__init__()
        assert source.bias is not None
        self.weight, self.bias, self.eps = _frozen(source.weight.float()), _frozen(source.bias.float()), source.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight, self.bias, self.eps).to(x.dtype)


class Tower(nn.Module):
    """CLIP: tiles [N, 3, H, W] -> class tokens of six blocks [N, 6, width]."""

    def __init__(self, source: NibbleTower, dtype: torch.dtype) -> None:
        super().__init__()
        assert source.class_embedding is not None and source.pre_norm is not None
        config = source.config
        self.taps, self.patch_size = config.taps, config.patch_size
        self.conv1 = _frozen(source.patch_embed.weight.to(dtype))
        self.class_embedding = _frozen(source.class_embedding.float())
        self.positional_embedding = _frozen(source.position_embedding.float())
        self.ln_pre = LayerNorm(source.pre_norm)
        self.resblocks = nn.ModuleList(
            TowerBlock(block, config.width, config.num_heads, dtype) for block in source.blocks()
        )

    def forward(self, tiles: Tensor) -> Tensor:
        x = F.conv2d(tiles.to(self.conv1.dtype), self.conv1, stride=self.patch_size).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat((first, x), dim=1) + self.positional_embedding.to(x.dtype))
        x = x.transpose(0, 1)  # [P, N, W]
        taken = []
        for done, block in enumerate(self.resblocks, start=1):
            x = block(x)
            if done in self.taps:
                taken.append(x[0])
        return torch.stack(taken, dim=1)


@dataclass(frozen=True, slots=True)
class Example:
    """One sample as the loop takes it, [1, S] each: the modality token is not among `ids`."""

    ids: Tensor
    labels: Tensor  # IGNORE where there is no target
    image: Tensor  # fp32 [1, 3, H, W], zeros for text
    slots: Tensor | None  # int64 [6], places of the image's tokens in ids

    def to(self, device: torch.device) -> Example:
        return Example(
            ids=self.ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            image=self.image.to(device, non_blocking=True),
            slots=None if self.slots is None else self.slots.to(device, non_blocking=True),
        )


class LavinLite(nn.Module):
    """The joint model. `forward`: one sample -> the mean loss of its targets."""

    def __init__(self, vlm: VisionLanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        language, config = vlm.language, vlm.language.config
        assert isinstance(vlm.projector, LavinProjector) and vlm.modality_embedding is not None
        self.config = config
        self.tok_embeddings = nn.Embedding.from_pretrained(language.embed.weight.detach().to(dtype), freeze=True)
        self.layers = nn.ModuleList(
            Block(block, config, dtype) for block in language.blocks() if isinstance(block, NibbleBlock)
        )
        self.norm = RMSNorm(language.norm, dtype)
        self.output = linear(language.head, dtype)
        self.tower = Tower(vlm.vision, dtype)
        self.adapter_proj = nn.Sequential(_copy(vlm.projector.fc1), nn.SiLU(), _copy(vlm.projector.fc2))
        self.adapter_modality_embedding = nn.Parameter(vlm.modality_embedding.weight.detach().clone())
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        turns = torch.outer(torch.arange(2 * PADDED).float(), inverse).to(language.embed.weight.device)
        self.register_buffer("angles", torch.polar(torch.ones_like(turns), turns), persistent=False)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def forward(self, example: Example) -> Tensor:
        x = self.tok_embeddings(example.ids)  # [1, S, D]
        features = self.tower(example.image)
        with _autocast(x):
            image = self.adapter_proj(features).to(x.dtype)  # [1, 6, D]
        if example.slots is not None:
            x = x.index_copy(1, example.slots, image)
        which = int(example.slots is not None)
        x = torch.cat((self.adapter_modality_embedding[None, None, which].to(x.dtype), x), dim=1)
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        mask[1:, 0] = float("-inf")  # nobody else sees the modality token
        angles: Any = self.angles
        for layer in self.layers:
            x = layer(x, angles[:length], mask)
        logits = self.output(self.norm(x))[:, :-1]  # row i predicts token i of ids
        return F.cross_entropy(logits.flatten(0, 1), example.labels.flatten(), ignore_index=IGNORE)


class LavinTrainer:
    """The loop.

    Args:
        polite: without the waits of LaVIN's loop for the device (for runs that are not timed).
        order: a seed for the order in which a step's samples are summed up; None: as they come.
    """

    def __init__(
        self, vlm: VisionLanguageModel, device: torch.device, *, dtype: torch.dtype = torch.float16, lr: float = LR,
        padded: int = PADDED, polite: bool = False, order: int | None = None,
    ) -> None:  # fmt: skip
        self.warm_ups = 1
        self.device, self.padded, self.polite = device, padded, polite
        self.image_size = vlm.vision.config.image_size
        self.model = LavinLite(vlm, dtype).train()
        self.borrowed_bytes = sum(
            layer.quantized.packed().nbytes
            for layer in vlm.modules()
            if isinstance(layer, Linear) and layer.quantized is not None
        )
        named = list(self.model.trainable())
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": WEIGHT_DECAY},
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.order = None if order is None else torch.Generator().manual_seed(order)

    def prepare(self, work: Workload) -> list[Example]:
        black = torch.zeros(3, self.image_size, self.image_size)
        examples = []
        for sample, tile in zip(work.samples, work.tiles, strict=True):
            fill = self.padded - 1 - len(sample.input_ids)
            slots = torch.tensor(sample.image_slots)
            examples.append(
                Example(
                    ids=pinned(torch.tensor([sample.input_ids + [0] * fill]), self.device),
                    labels=pinned(torch.tensor([sample.labels + [IGNORE] * fill]), self.device),
                    image=pinned((black if tile is None else tile)[None], self.device),
                    slots=pinned(slots, self.device) if slots.numel() else None,
                )
            )
        return examples

    def step(self, batch: list[Example]) -> float:
        order = list(range(len(batch)))
        if self.order is not None:
            order = torch.randperm(len(batch), generator=self.order).tolist()
        total = torch.zeros((), device=self.device)
        told = 0.0
        for i in order:
            loss = self.model(batch[i].to(self.device))
            total += loss.detach().float()
            if not self.polite:
                told += loss.item()  # its log
                if not torch.isfinite(loss).item():
                    continue
            self.scaler.scale(loss / len(batch)).backward()
            if not self.polite and self.device.type == "cuda":
                torch.cuda.synchronize()
        self.scaler.unscale_(self.optimizer)
        trained = [p for _, p in self.model.trainable() if p.grad is not None]
        torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])  # logged, not clipped
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total.item() / len(batch)

    def launched(self) -> str:
        return ""


def linear(layer: Linear, dtype: torch.dtype) -> nn.Module:
    """The same linear, frozen: bitsandbytes' Linear4bit over the same packed weight, or torch's."""
    weight = layer.frozen_weight()
    if isinstance(weight, NF4Tensor):
        assert layer.bias is None
        return linear4bit(weight, dtype)
    with torch.device("meta"):
        own = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    own.weight = _frozen(_dense(layer, dtype))
    if layer.bias is not None:
        own.bias = _frozen(_bias(layer, dtype))
    return own


def linear4bit(weight: NF4Tensor, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' module over the memory of `weight`, computing in `dtype`."""
    modules: Any = importlib.import_module("bitsandbytes.nn")
    layer: Any = empty_linear4bit(weight.shape[0], weight.shape[1], dtype)
    codes, state = to_quant_state(replace(weight, dtype=dtype))
    layer.weight = modules.Params4bit(codes, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer)
    layer.quant_state = state
    return layer


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, S, H, d] by angles [S, d / 2], complex numbers of length one; channels 2i and 2i + 1 are a pair."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).to(x.dtype)


def _autocast(x: Tensor) -> torch.autocast:
    """In x's dtype; none for fp32."""
    half = x.dtype != torch.float32
    return torch.autocast(x.device.type, dtype=x.dtype if half else torch.bfloat16, enabled=half)


def _dense(layer: Linear, dtype: torch.dtype) -> Tensor:
    weight = layer.frozen_weight()
    assert isinstance(weight, Tensor)
    return weight.detach().to(dtype)


def _bias(layer: Linear, dtype: torch.dtype) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach().to(dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _copy(layer: nn.Linear) -> nn.Linear:
    own = nn.Linear(layer.in_features, layer.out_features, device="meta")
    own.weight = nn.Parameter(layer.weight.detach().clone())
    own.bias = nn.Parameter(layer.bias.detach().clone())
    return own
