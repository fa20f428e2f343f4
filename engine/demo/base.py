"""The embedded demo's base model: a small LLaMA and a small CLIP tower, shipped as one safetensors file.

They were trained by this engine in its full-parameter mode on `base` problems (engine/demo/problems.py), together with
a projector that was thrown away. `python -m engine.demo.base` builds the file and its tokenizer again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import find_latest, load_checkpoint
from engine.data.prompts import prompt, target
from engine.demo.cache import BASE_TOKENIZER, BASE_WEIGHTS
from engine.demo.draft import Draft
from engine.demo.lessons import base_lessons, write_lessons
from engine.demo.problems import as_problem
from engine.demo.tokenizer import train_tokenizer
from engine.errors import run_command
from engine.flags import parse_train
from engine.run import train
from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig
from models.weights import meta
from models.weights.names import language_shapes
from models.weights.towers import clip
from models.weights.towers.layout import tower_shapes

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
    tower = {clip.EXPORT.of(name): tensors[f"vision.{name}"].contiguous() for name in tower_shapes(vision)}
    save_file(tower, folder / "tower" / "model.safetensors")


def fresh_base(language: LlamaConfig, vision: ClipConfig, seed: int) -> dict[str, Tensor]:
    """Random weights to start from: normal with deviation 1 / sqrt(inputs), 1 / sqrt(depth) less where a branch ends;
    embeddings 0.3 and 0.5, norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"language.{n}": s for n, s in language_shapes(language).items()}
    tower = tower_shapes(vision)
    first_patches = sorted(tower, key=lambda name: name != "patch_embed.weight")  # as the embedded base was drawn
    shapes |= {f"vision.{name}": tower[name] for name in first_patches}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = _deviation(name, shape, language, vision) * torch.randn(shape, generator=generator)
    return tensors


def _deviation(name: str, shape: tuple[int, ...], language: LlamaConfig, vision: ClipConfig) -> float:
    if name == "language.embed.weight":
        return 0.3
    if name.endswith("_embedding"):
        return 0.5
    depth = language.num_layers if name.startswith("language") else vision.num_layers
    shrink = math.sqrt(depth) if name.endswith(("attention.o.weight", "mlp.down.weight")) else 1.0
    return 1 / math.sqrt(math.prod(shape[1:])) / shrink


def pack_base(tensors: Mapping[str, Tensor], language: LlamaConfig, vision: ClipConfig, path: Path) -> None:
    """Writes the base as one fp16 safetensors file with its shape in the header."""
    kept = {n: t.to(torch.float16).contiguous() for n, t in tensors.items() if n.startswith(("language.", "vision."))}
    shape = {"language": asdict(language), "vision": asdict(vision)}
    save_file(kept, path, metadata={"shape": json.dumps(shape)})


LANGUAGE = LlamaConfig(
    vocab_size=640, dim=64, num_layers=4, num_heads=4, num_kv_heads=4, ffn_dim=160, norm_eps=1e-5
)  # fmt: skip
VISION = ClipConfig(width=48, num_layers=6, num_heads=3, patch_size=16, image_size=48, mlp_dim=192)
LESSONS = 36_000


def build_base(folder: Path) -> None:
    """Trains the base from nothing in `folder` (a new directory), 12,375 steps, and replaces the shipped files."""
    start = folder / "start"
    write_base(start, LANGUAGE, VISION, fresh_base(LANGUAGE, VISION, seed=0))
    lessons = base_lessons(0, LESSONS)
    train_tokenizer(_texts(lessons[:8000]), start / "tokenizer.model")
    write_lessons(folder / "lessons", lessons)
    run = _train(folder / "lessons", start, folder / "run")
    step = find_latest(run)
    assert step is not None
    pack_base(load_checkpoint(step, only=["model"])[0], LANGUAGE, VISION, BASE_WEIGHTS)
    shutil.copyfile(start / "tokenizer.model", BASE_TOKENIZER)


def _train(data: Path, start: Path, run: Path) -> Path:
    """Trains everything, by the command that a person would type. Returns the run directory."""
    config, notes = parse_train([
        "--bits", "16bit", "--model.language", str(start), "--model.vision", str(start / "tower"),
        "--model.projector", "lavin", "--dataset.root", str(data), "--output_dir", str(run),
        "--train.language", "full", "--train.vision", "full",
        "--optim.epochs", "11", "--optim.lr", "1e-3", "--optim.warmup_epochs", "0.2", "--optim.clip_grad", "1.0",
        "--optim.reduction", "sample", "--log.every", "100",
    ])  # fmt: skip
    train(config, ["python -m engine.demo.base"], notes)
    return run


def _texts(drafts: Iterable[Draft]) -> Iterable[str]:
    for draft in drafts:
        problem = as_problem(draft, "train", grade=1)
        yield prompt(problem, "QCM-ALE", "ABCDE", "") + target(problem, "QCM-ALE", "ABCDE")


def main(argv: list[str]) -> int:
    """`python -m engine.demo.base FOLDER`: builds the base anew. Returns the exit code."""
    parser = argparse.ArgumentParser(description=build_base.__doc__)
    parser.add_argument("folder", type=Path, help="a new directory for what the build makes (about 200 MB)")
    folder: Path = parser.parse_args(argv).folder
    folder.mkdir(parents=True)
    build_base(folder)
    size = BASE_WEIGHTS.stat().st_size + BASE_TOKENIZER.stat().st_size
    print(f"{BASE_WEIGHTS} and {BASE_TOKENIZER.name}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
