"""Tiny models as their users have them on disk: language models, towers and a tokenizer in transformers' layouts, EVA's
.pt, and rows with pictures. Written without transformers, which takes seconds to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.vision.eva import EvaConfig
from models.vision.siglip import SiglipConfig
from models.weights.families.registry import family_named
from models.weights.names import language_shapes
from models.weights.towers import clip, eva, siglip
from models.weights.towers.layout import tower_shapes
from tests.models.shapes import DIM, SIDE, WIDTH, language, tower
from tests.world import make_rows

__all__ = ["DIM", "SIDE", "WIDTH"]
VOCABULARY = 99  # of the tokenizer, and one that has no token
_SIZES = {"vocab_size": VOCABULARY}
LANGUAGES = {
    "phi": language("phi", **_SIZES, residual_dropout=0.1),
    "llama": language("llama-3", **_SIZES),
    "phi3": language("phi3", **_SIZES),
    "stablelm": language("stablelm", **_SIZES),
}
TOWERS = {
    "siglip": tower("siglip", select_layer=-1),
    "clip": tower("clip", num_layers=6, select_layer=-1),
    "eva": tower("eva", width=64, num_heads=1, select_layer=-1),  # its heads have 64 channels
}
Shapes = Mapping[str, tuple[int, ...]]


def make_home(root: Path, *, shards: int = 1) -> Path:
    """phi/ with a tokenizer.json, siglip/, clip/, and rows.json with its pictures."""
    write_language(root / "phi", "phi", shards=shards)
    for family in ("siglip", "clip"):
        write_tower(root / family, family)
    make_rows(root, 8)
    return root


def write_language(folder: Path, family: str, *, shards: int = 1, tokens: int = VOCABULARY - 1) -> Path:
    """A folder of transformers, in one file or in shards with an index, and a tokenizer with so many tokens."""
    config = LANGUAGES[family]
    found = family_named(config.family)
    tensors = random_tensors(found.layouts[0].names(config).expected(language_shapes(config)))
    folder.mkdir(parents=True)
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(found.settings_of(config)))
    write_tokenizer(folder, tokens)
    return folder


def write_tower(folder: Path, family: str) -> Path:
    """A folder of transformers, or EVA's file in it. Returns what is named as the tower."""
    config, layout = TOWERS[family], {"siglip": siglip.HF, "clip": clip.HF, "eva": eva.EVA}[family]
    tensors = random_tensors(layout.expected(tower_shapes(config)))
    folder.mkdir(parents=True)
    if isinstance(config, EvaConfig):
        torch.save({f"visual.{name}": tensor for name, tensor in tensors.items()}, folder / "EVA.pt")
        return folder / "EVA.pt"
    settings = siglip.settings_of(config) if isinstance(config, SiglipConfig) else clip.settings_of(config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def random_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Of these shapes, with norms about one; the same numbers for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def write_tokenizer(folder: Path, tokens: int) -> None:
    """Bytes, fillers up to the number, and one token that ends a text; none begins it, as in Phi's."""
    alphabet = sorted({*map(chr, range(32, 122)), "\u0120", "\u010a"})
    names = ["<|endoftext|>", *alphabet]
    names += [f"<unused_{i}>" for i in range(tokens - len(names))]
    vocabulary = {token: i for i, token in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
