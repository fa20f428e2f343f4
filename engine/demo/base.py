"""The embedded demo's base model: a small LLaMA and a small CLIP tower, shipped as one safetensors file.

They were trained by this engine in its full-parameter mode on `base` problems (engine/demo/problems.py), together with
a projector that was thrown away. `python -m engine.demo.base` builds the file and its tokenizer again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.demo.cache import BASE_TOKENIZER, BASE_WEIGHTS
from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig
from models.weights import clip_hf, meta
from models.weights.names import language_shapes, vision_shapes

MULTIPLE_OF = 64  # of params.json; the files' own shapes say how wide the MLP is


def unpack_base(folder: Path) -> None:
    """Writes the shipped base to `folder`: Meta's layout, tokenizer.model, and the tower in Hugging Face's layout."""
    with safe_open(BASE_WEIGHTS, framework="pt") as file:
        shape = json.loads(file.metadata()["shape"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    language, vision = LlamaConfig(**shape["language"]), ClipConfig(**shape["vision"])
    write_base(folder, language, vision, tensors)
    shutil.copyfile(BASE_TOKENIZER, folder / "tokenizer.model")


def write_base(folder: Path, language: LlamaConfig, vision: ClipConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors under our names (language.*, vision.*) as the files of the projects that the engine reads."""
    (folder / "tower").mkdir(parents=True)
    params = {
        "dim": language.dim, "multiple_of": MULTIPLE_OF, "n_heads": language.num_heads,
        "n_layers": language.num_layers, "norm_eps": language.norm_eps, "vocab_size": language.vocab_size,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
    shards = {meta.NAMES.of(name): tensors[f"language.{name}"] for name in language_shapes(language)}
    torch.save(shards, folder / "consolidated.00.pth")
    config = {
        "model_type": "clip_vision_model", "hidden_size": vision.width, "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads, "patch_size": vision.patch_size, "image_size": vision.image_size,
        "intermediate_size": vision.mlp_dim, "layer_norm_eps": vision.norm_eps, "hidden_act": "quick_gelu",
        "num_channels": 3,
    }  # fmt: skip
    (folder / "tower" / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    tower = {
        clip_hf.PREFIX + clip_hf.NAMES.of(name): tensors[f"vision.{name}"].contiguous()
        for name in vision_shapes(vision)
    }
    save_file(tower, folder / "tower" / "model.safetensors")


def fresh_base(language: LlamaConfig, vision: ClipConfig, seed: int) -> dict[str, Tensor]:
    """Random weights to start from: normal with deviation 1 / sqrt(inputs), norms one, biases zero, outputs of a branch
    shrunk by the depth."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"language.{n}": s for n, s in language_shapes(language).items()}
    shapes |= {f"vision.{n}": s for n, s in vision_shapes(vision).items()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        elif name.endswith(("embed.weight", "_embedding")):
            tensors[name] = torch.randn(shape, generator=generator)
        else:
            depth = language.num_layers if name.startswith("language") else vision.num_layers
            shrink = math.sqrt(2 * depth) if name.endswith(("attention.o.weight", "mlp.down.weight")) else 1.0
            deviation = 1 / math.sqrt(math.prod(shape[1:])) / shrink
            tensors[name] = deviation * torch.randn(shape, generator=generator)
    return tensors


def pack_base(tensors: Mapping[str, Tensor], language: LlamaConfig, vision: ClipConfig, path: Path) -> None:
    """Writes the base as one fp16 safetensors file with its shape in the header."""
    kept = {n: t.to(torch.float16).contiguous() for n, t in tensors.items() if n.startswith(("language.", "vision."))}
    shape = {"language": asdict(language), "vision": asdict(vision)}
    save_file(kept, path, metadata={"shape": json.dumps(shape)})
