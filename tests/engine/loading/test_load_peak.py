"""Loading streams (DESIGN.md, section 4): host memory is the model as it is stored plus its largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights import hf_llama, meta
from models.weights.names import language_shapes

ROOT = Path(__file__).resolve().parents[3]
CONFIG = LlamaConfig(vocab_size=32000, dim=1024, num_layers=11, num_heads=8, num_kv_heads=8, ffn_dim=2816)
LARGEST = 2 * CONFIG.vocab_size * CONFIG.dim
SLACK = 24 << 20  # allocator, thread's rhythm, file headers

Tensors = dict[str, Tensor]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def tensors() -> Iterator[tuple[str, Tensor]]:
    """217 million random weights in fp16; they repeat, which no layout makes use of."""
    values = (torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) - 0.5).half()
    for name, shape in language_shapes(CONFIG).items():
        count = torch.Size(shape).numel()
        yield name, values.repeat(-(-count // values.numel()))[:count].view(shape)


def two_shards(renamed: Tensors) -> tuple[Tensors, Tensors]:
    items = list(renamed.items())
    return dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])


def write_meta(folder: Path) -> int:
    params = {"dim": CONFIG.dim, "n_heads": CONFIG.num_heads, "n_layers": CONFIG.num_layers, "norm_eps": 1e-6}
    (folder / "params.json").write_text(json.dumps(params))
    shards: tuple[Tensors, Tensors] = ({}, {})
    for name, tensor in tensors():
        axis = meta._split_axis(name)
        halves = (tensor, tensor) if axis is None else tensor.chunk(2, dim=axis)
        for shard, half in zip(shards, halves, strict=True):
            shard[meta.NAMES.of(name)] = half.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    return 0


def write_hf(folder: Path, kind: str) -> int:
    settings = {
        "model_type": "llama", "hidden_size": CONFIG.dim, "intermediate_size": CONFIG.ffn_dim, "rms_norm_eps": 1e-6,
        "num_attention_heads": CONFIG.num_heads, "num_hidden_layers": CONFIG.num_layers,
        "vocab_size": CONFIG.vocab_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(two_shards({hf_llama.NAMES.of(name): tensor.contiguous() for name, tensor in tensors()})):
        file = f"{stem}-0000{i + 1}-of-00002.{end}"
        weight_map |= dict.fromkeys(shard, file)
        if kind == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file, _use_new_zipfile_serialization=kind == "bin")
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(file.stat().st_size for file in folder.glob("*.bin")) if kind == "old bin" else 0


def load(folder: Path, cache: Path) -> dict[str, Any]:
    environment = os.environ | {"NIBBLE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.loading.load_peak", folder],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(done.stderr, found)
    return found


@pytest.mark.parametrize("layout", ["meta", "safetensors", "bin", "old bin"])
def test_the_peak_is_the_stored_model_and_one_tensor(tmp_path: Path, layout: str) -> None:
    """The legacy .bin, which cannot be mapped, costs its largest file besides. A second start needs none of both."""
    weights = tmp_path / "weights"
    weights.mkdir()
    unmapped = write_meta(weights) if layout == "meta" else write_hf(weights, layout)
    first = load(weights, tmp_path / "cache")
    on_disk = sum(file.stat().st_size for file in weights.iterdir())
    assert first["RssAnon"] <= first["stored"] + LARGEST + unmapped + SLACK
    assert first["RssFile"] <= on_disk / 3  # what has been read is let go of
    assert first["stored"] < on_disk / 2  # else the first limit would be none
    if layout != "meta":
        return
    second = load(weights, tmp_path / "cache")
    assert second["cached"] and not first["cached"]
    assert second["RssAnon"] <= second["stored"] + SLACK
    assert second["stored"] == first["stored"]
