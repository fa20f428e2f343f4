"""LaVIN (arXiv 2305.15023) written the plain way, from its formulas: padded [B, S, D] tensors, one modality token a
sample, an explicit mask, complex RoPE, grouped convolutions. It shares nothing with models/ but the tensor names.

    index 0 of a row   modality token: sees itself only, is seen by nobody (a model without one: the embedding of id 0,
                       and the sample's positions begin at 0 behind it)
    index j + 1        token j of the sample (image tokens included), then right padding

It computes in the dtype of the weights it is given (the tests give it fp64), as LaVIN's evaluation does: no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.sample import IGNORE, Sample
from models.vlm import VLMConfig

Reduction = Literal["token", "sample", "micro_batch"]
NUM_TAPS = 6


@dataclass(frozen=True)
class Padded:
    """B samples side by side; S = longest sample + 1."""

    input_ids: Tensor  # int64 [B, S], 0 where no token stands
    labels: Tensor  # int64 [B, S], IGNORE where not a target
    images: Tensor  # fp32 [B, 3, H, W], zeros for a text sample
    has_image: Tensor  # int64 [B]
    image_slots: list[list[int]]  # columns of the image tokens, per sample


def pad(samples: Sequence[Sample], images: Sequence[Tensor | None], image_size: int) -> Padded:
    """Lays samples out as LaVIN does: the modality token first, padding last."""
    width = 1 + max(len(s.input_ids) for s in samples)
    input_ids = torch.zeros(len(samples), width, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    for b, sample in enumerate(samples):
        input_ids[b, 1 : 1 + len(sample.input_ids)] = torch.tensor(sample.input_ids)
        labels[b, 1 : 1 + len(sample.labels)] = torch.tensor(sample.labels)
    blank = torch.zeros(3, image_size, image_size)
    return Padded(
        input_ids=input_ids,
        labels=labels,
        images=torch.stack([blank if image is None else image for image in images]),
        has_image=torch.tensor([int(image is not None) for image in images]),
        image_slots=[[1 + slot for slot in sample.image_slots] for sample in samples],
    )


class PaddedReference:
    """The joint model over a dict of tensors (gradients flow to those that ask for one).

    `micro_batch` only matters to the legacy router of the tower: how many samples LaVIN sees together.
    """

    def __init__(self, config: VLMConfig, weights: dict[str, Tensor], micro_batch: int | None = None) -> None:
        self.config = config
        self.weights = weights
        self.micro_batch = micro_batch
        self.dtype = weights["language.embed.weight"].dtype

    # -- pieces -----------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    @staticmethod
    def heads(x: Tensor, count: int) -> Tensor:  # [B, S, D] -> [B, S, H, d]
        return x.unflatten(-1, (count, x.shape[-1] // count))

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
        return x / torch.sqrt(mean_square + self.config.language.norm_eps) * self.weights[f"{name}.weight"]

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        normed = centred / torch.sqrt(variance + self.config.vision.norm_eps)
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def conv(self, x: Tensor, name: str, groups: int) -> Tensor:
        """A 1x1 convolution over the tokens of x [B, S, in] -> [B, S, out], as LaVIN stores its adapters."""
        weight = self.weights[f"{name}.weight"][:, :, None]  # [out, in / groups, 1]
        return F.conv1d(x.transpose(1, 2), weight, self.weights[f"{name}.bias"], groups=groups).transpose(1, 2)

    def route(self, x_ref: Tensor, name: str) -> Tensor:
        """x_ref [..., D] -> weights of the two paths [..., 2]."""
        return torch.softmax(self.linear(x_ref, f"{name}.router") / self.config.adapter.temperature, dim=-1)

    def adapter(self, x: Tensor, name: str, routing: Tensor) -> Tensor:
        """x [B, S, D]; routing broadcasts to [B, S, 2]."""
        code = self.conv(x, f"{name}.down", groups=1)
        first = self.conv(code, f"{name}.up0", groups=2)
        second = self.conv(code, f"{name}.up1", groups=2)
        return x + self.config.adapter.scale * (routing[..., :1] * first + routing[..., 1:] * second)

    def plain_adapter(self, x: Tensor, name: str) -> Tensor:
        out = self.conv(self.conv(x, f"{name}.down", groups=1), f"{name}.up0", groups=2)
        return out if self.config.legacy.normal_adapter else x + self.config.adapter.scale * out

    def has(self, name: str) -> bool:
        return f"{name}.down.weight" in self.weights

    # -- vision -----------------------------------------------------------------------------------------------------

    def vision_adapter(self, x: Tensor, name: str) -> Tensor:
        """x [N, P, W], normed. Each token routes itself; LaVIN's code lets image 0 route them all."""
        if not self.has(name):
            return x
        if self.config.vision_placement == "normal":
            return self.plain_adapter(x, name)
        x_ref = x[:1] if self.config.legacy.clip_router else x
        return self.adapter(x, name, self.route(x_ref, name))

    def tower(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] -> class tokens after six evenly spaced blocks [N, 6, W]."""
        config, w = self.config.vision, self.weights
        x = F.conv2d(images.to(self.dtype), w["vision.patch_embed.weight"], stride=config.patch_size)
        x = x.flatten(2).transpose(1, 2)  # [N, P - 1, W]
        x = torch.cat([w["vision.class_embedding"].expand(x.shape[0], 1, -1), x], dim=1)
        x = self.layer_norm(x + w["vision.position_embedding"], "vision.pre_norm")
        taps = []
        for i in range(config.num_layers):
            name = f"vision.layers.{i}"
            y = self.vision_adapter(self.layer_norm(x, f"{name}.attention_norm"), f"{name}.attention_adapter")
            q, k, v = (self.heads(self.linear(y, f"{name}.attention.{p}"), config.num_heads) for p in "qkv")
            scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
            y = torch.einsum("nhqk,nkhd->nqhd", torch.softmax(scores, dim=-1), v).flatten(2)
            x = x + self.linear(y, f"{name}.attention.o")
            y = self.vision_adapter(self.layer_norm(x, f"{name}.mlp_norm"), f"{name}.mlp_adapter")
            y = self.linear(y, f"{name}.mlp.up")
            x = x + self.linear(y * torch.sigmoid(1.702 * y), f"{name}.mlp.down")
            if (i + 1) % (config.num_layers // NUM_TAPS) == 0:
                taps.append(x[:, 0])
        return torch.stack(taps, dim=1)

    def image_tokens(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 6, D]; zero images of text samples go through the tower as well."""
        parts = images.split(self.micro_batch or len(images))
        features = torch.cat([self.tower(part) for part in parts])
        y = self.linear(features, "projector.fc1")
        return self.linear(y * torch.sigmoid(y), "projector.fc2")

    # -- language ---------------------------------------------------------------------------------------------------

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, S, H, d], positions [B, S]: dimensions 2i and 2i + 1 are one complex number."""
        d = x.shape[-1]
        frequency = 1.0 / self.config.language.rope_theta ** (torch.arange(0, d, 2).float() / d)
        angle = positions.float()[..., None] * frequency  # [B, S, d / 2]; LLaMA's table is fp32
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, :, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    def embed(self, batch: Padded) -> Tensor:
        """Tokens, image tokens and modality tokens: [B, S, D]."""
        embedded = self.weights["language.embed.weight"][batch.input_ids]
        image = self.image_tokens(batch.images)
        rows = []
        for b in range(len(embedded)):
            columns = list(embedded[b])
            if self.config.has_modality_token:
                columns[0] = self.weights["modality_embedding.weight"][batch.has_image[b]]
            for k, slot in enumerate(batch.image_slots[b]):
                columns[slot] = image[b, k]
            rows.append(torch.stack(columns))
        return torch.stack(rows)

    def hidden(self, batch: Padded, *, positions: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        """The residual stream after the last block, [B, S, D].

        `positions` int64 [B, S] replaces 0, 1, 2, ...; `branch_scale` [layers, 2, B] multiplies the attention and the
        MLP branch of each sample (what drop path does).
        """
        config = self.config.language
        x = self.embed(batch)
        size, width = batch.input_ids.shape
        if positions is None:
            first = 0 if self.config.has_modality_token else -1
            positions = (torch.arange(width) + first).clamp(min=0).expand(size, width)
        mask = torch.full((width, width), float("-inf"), dtype=x.dtype).triu(1)
        mask[1:, 0] = float("-inf")
        for i in range(config.num_layers):
            name = f"language.layers.{i}"
            stream = x
            y = self.rms_norm(x, f"{name}.attention_norm")
            if self.has(f"{name}.attention_adapter"):
                y = self.adapter(y, f"{name}.attention_adapter", self.route(y[:, :1], f"{name}.attention_adapter"))
            q, k, v = (self.heads(self.linear(y, f"{name}.attention.{p}"), config.num_heads) for p in "qkv")
            q, k = self.rope(q, positions), self.rope(k, positions)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + mask
            y = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), v).flatten(2)
            y = self.linear(y, f"{name}.attention.o")
            x = x + (y if branch_scale is None else branch_scale[i, 0][:, None, None] * y)

            y = self.rms_norm(x, f"{name}.mlp_norm")
            if self.has(f"{name}.mlp_adapter"):
                x_ref = self.rms_norm(stream, f"{name}.mlp_norm") if self.config.legacy.block_routing else y
                y = self.adapter(y, f"{name}.mlp_adapter", self.route(x_ref[:, :1], f"{name}.mlp_adapter"))
            gate = self.linear(y, f"{name}.mlp.gate")
            y = self.linear(gate * torch.sigmoid(gate) * self.linear(y, f"{name}.mlp.up"), f"{name}.mlp.down")
            x = x + (y if branch_scale is None else branch_scale[i, 1][:, None, None] * y)
        return x

    def logits(self, batch: Padded, *, positions: Tensor | None = None) -> Tensor:
        """[B, S, V]."""
        return self.linear(self.rms_norm(self.hidden(batch, positions=positions), "language.norm"), "language.head")

    def loss(self, logits: Tensor, batch: Padded, reduction: Reduction, micro_batch: int) -> Tensor:
        """Cross entropy of logits[:, :-1] against labels[:, 1:], averaged over tokens, over samples' means, or over
        the means of micro-batches of `micro_batch` samples."""
        targets = batch.labels[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        ).unflatten(0, targets.shape)
        kept = targets != IGNORE
        size = {"token": len(targets), "sample": 1, "micro_batch": micro_batch}[reduction]
        means = [part[keep].mean() for part, keep in zip(losses.split(size), kept.split(size), strict=True)]
        return torch.stack(means).mean()
