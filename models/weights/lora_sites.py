"""Where a LoRA may be: the linears of the blocks, by our names and by PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.language.config import DecoderConfig
from models.language.decoder import make_layer
from models.linear import Linear
from models.vision.tower import TowerConfig, make_tower
from models.weights.archive import Shape
from models.weights.families.registry import family_named
from models.weights.names import Names, Part
from models.weights.view import Tensors

SIDES = {"a": "lora_A", "b": "lora_B"}


@dataclass(frozen=True, slots=True)
class Site:
    """One linear of ours that may carry LoRA: its name, and where PEFT has it."""

    name: str  # layers.0.attention.q
    theirs: str  # model.layers.0.self_attn.q_proj
    part: Part | None  # which rows of theirs are ours
    shape: Shape  # [out, in]

    def expected(self, rank: int) -> dict[str, Shape]:
        """PEFT's two tensors and their shapes."""
        out = self.part.whole(self.shape) if self.part else self.shape
        return {f"{self.theirs}.lora_A.weight": (rank, self.shape[1]), f"{self.theirs}.lora_B.weight": (out[0], rank)}

    def read(self, tensors: Tensors) -> dict[str, Tensor]:
        """Ours, copies. A LoRA on a linear that is three of ours has one A for all of them."""
        a, b = (tensors.fetch(f"{self.theirs}.{side}.weight") for side in SIDES.values())
        rows = self.part.take(b) if self.part else b
        return {f"{self.name}.lora.a": a.clone(), f"{self.name}.lora.b": rows.clone()}


def language_sites(config: DecoderConfig, found: Iterable[str] = ()) -> list[Site]:
    """Every linear of the language model, in that layout of its family which a file with the names `found` has."""
    layouts = [layout.names(config) for layout in family_named(config.family).layouts]
    held, block = set(found), _block(config)
    modules = _linears([block])
    names = max(layouts, key=lambda names: sum(f"{_theirs(names, 0, m)}.lora_A.weight" in held for m in modules))
    return _sites([block], config.num_layers, names)


def tower_sites(config: TowerConfig, names: Names) -> list[Site]:
    """Every linear of the blocks that a tower runs."""
    with torch.device("meta"):
        blocks = make_tower(config).blocks()
    return _sites(blocks[:1], config.layers_run, names)


def language_linears(config: DecoderConfig) -> dict[str, str]:
    """PEFT's name, as of today, of each linear in a block: {"attention.q": "self_attn.q_proj", ...}."""
    modules = family_named(config.family).layouts[0].names(config).modules
    return {name: modules[name] for name in _linears([_block(config)])}


def linear_of(site: str) -> str:
    """`layers.0.attention.q` -> `attention.q`"""
    return site.split(".", 2)[2]


def _block(config: DecoderConfig) -> nn.Module:
    with torch.device("meta"):
        return make_layer(config, 0)


def _sites(like: Sequence[nn.Module], num_layers: int, names: Names) -> list[Site]:
    """Every linear of `num_layers` blocks like the one in `like`."""
    return [
        Site(f"layers.{i}.{name}", _theirs(names, i, name), names.part(f"layers.{i}.{name}.weight"),
             (linear.out_features, linear.in_features))
        for i in range(num_layers) for name, linear in _linears(like).items()
    ]  # fmt: skip


def _theirs(names: Names, index: int, linear: str) -> str:
    return names.of(f"layers.{index}.{linear}.weight").removesuffix(".weight")


def _linears(blocks: Sequence[nn.Module]) -> dict[str, Linear]:
    return {name: part for block in blocks for name, part in block.named_modules() if isinstance(part, Linear)}
