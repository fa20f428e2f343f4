"""Loading streams (DESIGN.md, section 4): host memory is the model as it is stored plus its largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights import meta
from models.weights.families import llama
from models.weights.names import language_shapes

ROOT = Path(__file__).resolve().parents[3]
LARGE = LlamaConfig(vocab_size=32000, dim=1024, num_layers=11, num_heads=8, num_kv_heads=8, ffn_dim=2816)  # 207 M
SMALL = replace(LARGE, vocab_size=16000, num_layers=4)  # 84 M: what is not let go of is still far more than SLACK
LAYOUTS = ("safetensors", "bin", "old bin")  # of Hugging Face
SLACK = 24 << 20  # allocator, thread's rhythm, file headers

Tensors = dict[str, Tensor]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def tensors(config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Random weights in fp16; they repeat, which no layout makes use of."""
    values = (torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) - 0.5).half()
    for name, shape in language_shapes(config).items():
        count = torch.Size(shape).numel()
        yield name, values.repeat(-(-count // values.numel()))[:count].view(shape)


def two_shards(renamed: Tensors) -> tuple[Tensors, Tensors]:
    items = list(renamed.items())
    return dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])


def write_meta(folder: Path, config: LlamaConfig) -> None:
    params = {"dim": config.dim, "n_heads": config.num_heads, "n_layers": config.num_layers, "norm_eps": 1e-6}
    (folder / "params.json").write_text(json.dumps(params))
    shards: tuple[Tensors, Tensors] = ({}, {})
    for name, tensor in tensors(config):
        axis = None if name.endswith(meta.WHOLE) else int(name.endswith(("embed.weight", *meta.SPLIT_COLUMNS)))
        halves = (tensor, tensor) if axis is None else tensor.chunk(2, dim=axis)
        for shard, half in zip(shards, halves, strict=True):
            shard[meta.NAMES.of(name)] = half.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")


def write_hf(folder: Path, config: LlamaConfig, kind: str) -> int:
    """Two shards. Returns the bytes of the largest file that cannot be mapped."""
    settings = {
        "model_type": "llama", "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "rms_norm_eps": 1e-6,
        "num_attention_heads": config.num_heads, "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    renamed = {llama.NAMES.of(name): tensor.contiguous() for name, tensor in tensors(config)}
    for i, shard in enumerate(two_shards(renamed)):
        file = f"{stem}-0000{i + 1}-of-00002.{end}"
        weight_map |= dict.fromkeys(shard, file)
        if kind == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file, _use_new_zipfile_serialization=kind == "bin")
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(file.stat().st_size for file in folder.glob("*.bin")) if kind == "old bin" else 0


def load(cache: Path, *folders: Path) -> list[dict[str, Any]]:
    """What a process of its own measures, which loads one model after another."""
    environment = os.environ | {"NIBBLE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.loading.load_peak", *folders],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stderr, done.stdout)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_first(folder: Path, config: LlamaConfig, found: Mapping[str, Any], unmapped: int = 0) -> None:
    """Anonymous memory is the model as it is stored and the largest tensor; besides only what cannot be mapped."""
    largest = 2 * config.vocab_size * config.dim
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    limit = found["stored"] + largest + unmapped + SLACK
    assert found["RssAnon"] <= limit
    assert found["RssFile"] <= on_disk / 3  # what has been read is let go of
    assert limit < 0.9 * (found["stored"] + on_disk)  # else the first limit would be none
    assert not found["cached"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """By layout: its folder, the bytes of its largest file that cannot be mapped, and what loading it took."""
    folders = {layout: tmp_path_factory.mktemp("weights") for layout in LAYOUTS}
    unmapped = {layout: write_hf(folder, SMALL, layout) for layout, folder in folders.items()}
    found = load(tmp_path_factory.mktemp("cache"), *folders.values())
    return {layout: (folders[layout], unmapped[layout], each) for layout, each in zip(LAYOUTS, found, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_is_the_stored_model_and_one_tensor(
    measured: Mapping[str, tuple[Path, int, dict[str, Any]]], layout: str
) -> None:
    """The legacy .bin, which cannot be mapped, costs its largest file besides."""
    folder, unmapped, found = measured[layout]
    check_first(folder, SMALL, found, unmapped)


def test_200_million_weights_and_their_second_start(tmp_path: Path) -> None:
    """Meta's layout, two shards whose halves are joined. The second start reads no source: it takes what is stored."""
    weights = tmp_path / "weights"
    weights.mkdir()
    write_meta(weights, LARGE)
    (first,), (second,) = (load(tmp_path / "cache", weights) for _ in range(2))
    check_first(weights, LARGE, first)
    assert second["cached"] and second["stored"] == first["stored"]
    assert second["RssAnon"] <= second["stored"] + SLACK
