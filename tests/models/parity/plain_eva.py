"""EVA02-CLIP's tower (arXiv 2303.15389; baaivision/EVA) in plain torch, one image at a time, by the names of its file
of weights. It shares nothing with models/vision."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, THETA, TRAINED_GRID = 1e-6, 10000.0, 16


@dataclass(frozen=True)
class Shape:
    heads: int
    layers: int
    mlp: int
    patch: int
    grid: int
    head_dim: int = 64  # of every EVA02-CLIP; the file does not say

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def random_shape(draw: random.Random, mlps: tuple[int, ...] = (21, 34, 50)) -> Shape:
    return Shape(
        heads=draw.choice((1, 2)), layers=draw.choice((2, 3, 4)), mlp=draw.choice(mlps),
        patch=draw.choice((2, 3)), grid=draw.choice((2, 3, 5)),
    )  # fmt: skip


def random_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """The `visual.*` tensors of a file, every one random."""
    generator = torch.Generator().manual_seed(seed)
    width, mlp = shape.width, shape.mlp

    def noise(*size: int, scale: float = 0.5, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(size, generator=generator)

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": noise(size, scale=0.2, mean=1.0), f"{name}.bias": noise(size)}

    def linear(name: str, out: int, inside: int, bias: bool = True) -> dict[str, Tensor]:
        found = {f"{name}.weight": noise(out, inside, scale=inside**-0.5)}
        return found | ({f"{name}.bias": noise(out)} if bias else {})

    tensors = {
        "cls_token": noise(1, 1, width), "pos_embed": noise(1, shape.grid**2 + 1, width),
        "patch_embed.proj.weight": noise(width, 3, shape.patch, shape.patch, scale=0.3),
        "patch_embed.proj.bias": noise(width),
    }  # fmt: skip
    cos, sin = rotation(shape)
    for i in range(shape.layers):
        parts = (
            norm("norm1", width) | norm("norm2", width) | norm("attn.inner_attn_ln", width) | norm("mlp.ffn_ln", mlp)
        )
        parts |= {"attn.q_bias": noise(width), "attn.v_bias": noise(width)}
        for name in ("q_proj", "k_proj", "v_proj"):
            parts |= linear(f"attn.{name}", width, width, bias=False)
        parts |= linear("attn.proj", width, width) | linear("mlp.w1", mlp, width)
        parts |= linear("mlp.w2", mlp, width) | linear("mlp.w3", width, mlp)
        parts |= {"attn.rope.freqs_cos": cos, "attn.rope.freqs_sin": sin}
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
    tensors |= norm("norm", width) | linear("head", 12, width)
    tensors |= {"rope.freqs_cos": cos, "rope.freqs_sin": sin}
    return {f"visual.{name}": tensor for name, tensor in tensors.items()}


def rotation(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin [patches, head_dim]: half of a head turns by the row, half by the column, neighbours in pairs."""
    pairs = shape.head_dim // 4
    angles = torch.zeros(shape.grid, shape.grid, shape.head_dim)
    for row in range(shape.grid):
        for column in range(shape.grid):
            for i in range(pairs):
                speed = THETA ** (-2 * i / (shape.head_dim // 2))
                place = torch.tensor([row, column]) / shape.grid * TRAINED_GRID
                angles[row, column, 2 * i : 2 * i + 2] = place[0] * speed
                half = shape.head_dim // 2 + 2 * i
                angles[row, column, half : half + 2] = place[1] * speed
    angles = angles.flatten(0, 1)
    return angles.cos(), angles.sin()


def hidden_states(weights: dict[str, Tensor], shape: Shape, image: Tensor) -> list[Tensor]:
    """What enters the first block and what leaves each, [1 + patches, width], of an image [3, H, W]."""

    def w(name: str) -> Tensor:
        return weights[f"visual.{name}"]

    patches = F.conv2d(image[None], w("patch_embed.proj.weight"), w("patch_embed.proj.bias"), stride=shape.patch)
    x = torch.cat((w("cls_token")[0], patches[0].flatten(1).T)) + w("pos_embed")[0]
    states = [x]
    for i in range(shape.layers):
        x = x + _attention(weights, f"visual.blocks.{i}.", shape, x)
        x = x + _mlp(weights, f"visual.blocks.{i}.", x)
        states.append(x)
    return states


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(weights: dict[str, Tensor], block: str, shape: Shape, x: Tensor) -> Tensor:
    n = _norm(weights, f"{block}norm1", x)
    q = n @ weights[f"{block}attn.q_proj.weight"].T + weights[f"{block}attn.q_bias"]
    k = n @ weights[f"{block}attn.k_proj.weight"].T
    v = n @ weights[f"{block}attn.v_proj.weight"].T + weights[f"{block}attn.v_bias"]
    cos, sin = rotation(shape)
    heads = []
    for h in range(shape.heads):
        of_head = slice(h * shape.head_dim, (h + 1) * shape.head_dim)
        qh, kh = (_turned(part[:, of_head], cos, sin) for part in (q, k))
        heads.append(torch.softmax(qh @ kh.T / shape.head_dim**0.5, dim=-1) @ v[:, of_head])
    joined = _norm(weights, f"{block}attn.inner_attn_ln", torch.cat(heads, dim=-1))
    return joined @ weights[f"{block}attn.proj.weight"].T + weights[f"{block}attn.proj.bias"]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The class token stays as it is; of every patch the channels (a, b) become (a cos - b sin, b cos + a sin)."""
    patches = x[1:]
    crossed = torch.stack((-patches[:, 1::2], patches[:, 0::2]), dim=-1).flatten(1)
    return torch.cat((x[:1], patches * cos + crossed * sin))


def _mlp(weights: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    n = _norm(weights, f"{block}norm2", x)
    gate, up = (n @ weights[f"{block}mlp.{k}.weight"].T + weights[f"{block}mlp.{k}.bias"] for k in ("w1", "w2"))
    hidden = _norm(weights, f"{block}mlp.ffn_ln", gate * torch.sigmoid(gate) * up)
    return hidden @ weights[f"{block}mlp.w3.weight"].T + weights[f"{block}mlp.w3.bias"]
