"""LaVIN's folders as its scripts find them: data/ with tiny weights and problems, beside LaVIN/ with its commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engine.demo.base import fresh_base, write_base
from models.language.llama import LlamaConfig
from models.weights.families.llama import NAMES
from models.weights.names import language_shapes
from tests.world import COLORS, TOWER, language_config, make_scienceqa, make_tokenizer

REPOSITORY = Path(__file__).parents[2]
NUM_TRAIN, NUM_TEST, NUM_CHAT = 32, 12, 64  # one of LaVIN's steps of 32 an epoch, and two of chat
SPLIT_COLUMNS = ("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight")


def make_home(root: Path) -> Path:
    """Writes data/ and LaVIN/ under `root`; returns LaVIN/, where train.py and eval.py are."""
    data, weights, home = root / "data", root / "data" / "weights", root / "LaVIN"
    weights.mkdir(parents=True)
    small = language_config(make_tokenizer(weights / "tokenizer.model"))
    large = replace(small, dim=64, num_layers=3, num_heads=4, num_kv_heads=4, ffn_dim=136)
    for name, config, num_shards in (("7B", small, 1), ("13B", large, 2)):
        write_base(weights / name, config, TOWER, _opinionated(fresh_base(config, TOWER, seed=3)))
        shutil.move(weights / name / "tower", root / f"tower-{name}")
        _split(weights / name, num_shards)
        _write_delta(weights / f"vicuna_{name}", config)
    (root / "tower-7B").rename(weights / "clip-vit-large-patch14")
    make_scienceqa(data, NUM_TRAIN, NUM_TEST)
    _write_chat(data)
    home.mkdir()
    for command in ("train.py", "eval.py"):
        (home / command).symlink_to(REPOSITORY / command)
    return home


def _opinionated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Branches so strong that the model answers different problems differently, untrained as it is."""
    strong = ("attention.v.weight", "attention.o.weight", "mlp.down.weight")
    return {n: 4 * t if n.startswith("language.") and n.endswith(strong) else t for n, t in tensors.items()}


def _split(folder: Path, num_shards: int) -> None:
    """Cuts consolidated.00.pth as Meta does: embedding and row-parallel weights by columns, norms not at all."""
    whole: dict[str, Tensor] = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for shard in range(num_shards):
        part = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            axis = 1 if name.endswith(SPLIT_COLUMNS) else 0
            part[name] = tensor if tensor.ndim == 1 else tensor.chunk(num_shards, axis)[shard].clone()
        torch.save(part, folder / f"consolidated.{shard:02}.pth")


def _write_delta(folder: Path, config: LlamaConfig) -> None:
    """A Vicuna delta as it was published: Hugging Face's names, two .bin shards and their index."""
    folder.mkdir()
    values = {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": config.dim, "vocab_size": config.vocab_size,
        "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers, "rms_norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(1)
    shapes = language_shapes(config)
    tensors = {NAMES.of(name): 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weight_map = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_chat(data: Path) -> None:
    """all_data.json: a third with a picture of COCO, a sixth with one of ScienceQA, the others with none."""
    folder = data / "images" / "train2014"
    folder.mkdir()
    entries = []
    for i in range(NUM_CHAT):
        color = sorted(COLORS)[i % 3]
        source = (None, "mscoco", "mscoco", "sqa")[i % 4] if i < NUM_TRAIN else None
        image = {None: None, "mscoco": f"{i:012}.jpg", "sqa": "image.png"}[source]
        if source == "mscoco":
            Image.new("RGB", (20, 16), COLORS[color]).save(folder / f"COCO_train2014_{image}")
        entry = {
            "instruction": "Instruction: What is shown?\nResponse:", "answer": f"It is {color}.", "options": None,
            "image": image, "image_source": source, "qid": str(i) if source == "sqa" else f"gpt4_{i}",
        }  # fmt: skip
        entries.append(entry)
    (data / "all_data.json").write_text(json.dumps({"all": entries}))
