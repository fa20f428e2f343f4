"""Small towers of every family with every tensor random, tiles, and CLIP and SigLIP in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.adapters.mma import AdapterConfig
from models.recompute import Policy
from models.vision.tower import Tower, TowerConfig, make_tower
from tests.models import shapes
from tests.models.drawn import drawn

FAMILIES = ("clip", "eva", "siglip")
TILES = 3
ADAPTER = AdapterConfig(dim=8, scale=0.7, temperature=2.0, dropout=0.3)


def config_of(family: str, **options: Any) -> TowerConfig:
    """3 x 3 patches of 4 pixels, of a tile whose 13th row and column fill none; an MLP of odd width."""
    return shapes.tower(family, **{"num_layers": 4, "image_size": 13, "mlp_dim": 37, "norm_eps": 1e-5} | options)


def tower_of(
    config: TowerConfig, *, placement: str | None = None, lora: LoRAConfig | None = None, policy: Policy = "save_all",
    seed: int = 0,
) -> Tower:  # fmt: skip
    """In fp32. Adapters and LoRA learn where there are some, else everything does."""
    tower = make_tower(config)
    if placement is not None:
        tower.add_adapters(ADAPTER, placement, 1 << 12, legacy_normal=False)
    if lora is not None:
        tower.add_lora(lora, 1 << 19)
    for name, parameter in drawn(tower, seed).named_parameters():
        parameter.requires_grad_((placement is None or "_adapter." in name) and (lora is None or ".lora." in name))
    for block in tower.blocks():
        block.policy = policy
    return tower


def tiles_of(config: TowerConfig, tiles: int = TILES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tiles, 3, config.image_size, config.image_size, generator=generator)


def gradients(tower: Tower, features: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the features, of all that learns; what is not on the way has none."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features.dtype)
    learns = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad((features * weights).sum(), list(learns.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(learns, found, strict=True) if gradient is not None}


def plain_states(config: TowerConfig, w: dict[str, Tensor], tiles: Tensor) -> list[Tensor]:
    """CLIP and SigLIP by their papers: the output of the embeddings and of each block that `w` holds, [N, P, W]."""
    clip = config.family == "clip"

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    bias = None if clip else w["patch_embed.bias"]
    x = F.conv2d(tiles, w["patch_embed.weight"], bias, stride=config.patch_size).flatten(2).mT
    if clip:
        x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + w["position_embedding"]
    states = [norm(x, "pre_norm") if clip else x]
    for i in range(config.layers_run):
        x, at = states[-1], f"layers.{i}"
        y = norm(x, f"{at}.attention_norm")
        q, k, v = (
            linear(y, f"{at}.attention.{part}").unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for part in "qkv"
        )
        mixed = torch.softmax(q @ k.mT / config.head_dim**0.5, dim=-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{at}.attention.o")
        z = linear(norm(x, f"{at}.mlp_norm"), f"{at}.mlp.up")
        z = (
            z * torch.sigmoid(1.702 * z)
            if clip
            else z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2
        )
        states.append(x + linear(z, f"{at}.mlp.down"))
    return states
