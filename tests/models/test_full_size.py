"""LaVIN's real sizes on the meta device: how many parameters learn, and their names and shapes in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.lavin import write_lavin_adapters

SIZES = {  # name: (dim, layers, heads, ffn, trainable parameters)
    "7B": (4096, 32, 32, 11008, 3_781_296),
    "13B": (5120, 40, 40, 13824, 5_390_080),
    "30B": (6656, 60, 52, 17920, 9_482_696),
    "65B": (8192, 80, 64, 22016, 14_804_112),
}
LANGUAGE_ADAPTER = {"7B": 81_930, "13B": 102_410}
VISION_ADAPTER = 20_490


def on_meta(size: str, **options: Any) -> VisionLanguageModel:
    dim, layers, heads, ffn, _ = SIZES[size]
    language = LlamaConfig(
        vocab_size=32000, dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=heads, ffn_dim=ffn
    )
    with torch.device("meta"):
        return VisionLanguageModel(VLMConfig(language=language, vision=ClipConfig(), **options))


def trainable(model: VisionLanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.trainable().values())


@pytest.mark.parametrize("size", SIZES)
def test_as_many_parameters_learn_as_in_lavin(size: str) -> None:
    assert trainable(on_meta(size)) == SIZES[size][-1]


@pytest.mark.parametrize("size", LANGUAGE_ADAPTER)
def test_other_placements_add_an_adapter_to_each_mlp(size: str) -> None:
    layers, usual = SIZES[size][1], SIZES[size][-1]
    assert trainable(on_meta(size, language_placement="block")) == usual + layers * LANGUAGE_ADAPTER[size]
    assert trainable(on_meta(size, vision_placement="router_block")) == usual + 24 * VISION_ADAPTER
    without_router = 24 * (1024 * 4 + 1024 + 2 * 1024 + 2)
    assert trainable(on_meta(size, vision_placement="normal")) == usual - without_router


@pytest.mark.parametrize("size", ["7B", "13B"])
@pytest.mark.parametrize("block", [False, True], ids=["attn", "block"])
def test_names_and_shapes_are_those_of_lavins_checkpoints(size: str, block: bool, tmp_path: Path) -> None:
    places = {"language_placement": "block", "vision_placement": "router_block"} if block else {}
    model = on_meta(size, **places)
    zeros = {name: torch.zeros(()).expand(parameter.shape) for name, parameter in model.trainable().items()}
    write_lavin_adapters(tmp_path / "checkpoint-19.pth", zeros, epoch=19, args={}, module_prefix=True)
    found = torch.load(tmp_path / "checkpoint-19.pth", weights_only=True, mmap=True)["model"]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == lavin_shapes(size, block)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def lavin_shapes(size: str, block: bool) -> dict[str, tuple[int, ...]]:
    """What LaVIN saves under torchrun: every parameter with `adapter` in its name."""
    dim, layers, *_ = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_modality_embedding.weight": (2, dim),
        "adapter_proj.conv_A.weight": (128, 1024),
        "adapter_proj.conv_A.bias": (128,),
        "adapter_proj.conv_B.weight": (dim, 128),
        "adapter_proj.conv_B.bias": (dim,),
    }
    stacks = (("layers", layers, dim), ("backbone.visual.transformer.resblocks", 24, 1024))
    for prefix, count, width in stacks:
        adapter = {
            "conv_A.weight": (8, width, 1),
            "conv_A.bias": (8,),
            "conv_B.weight": (width, 4, 1),
            "conv_B.bias": (width,),
            "conv_D.weight": (width, 4, 1),
            "conv_D.bias": (width,),
            "expert_weights.weight": (2, width),
            "expert_weights.bias": (2,),
        }
        for i in range(count):
            for place in ("adapter_attn", "adapter_mlp") if block else ("adapter_attn",):
                shapes |= {f"{prefix}.{i}.{place}.{name}": shape for name, shape in adapter.items()}
    return {f"module.{name}": shape for name, shape in shapes.items()}
