"""Tiny checkpoints: language models and towers that transformers saves, tokenizers, and what is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from engine.export.assemble import vlm_parts
from engine.export.config import ExportConfig
from engine.export.origin import LoRATensors, Origin
from models.adapters.lora import LoRAConfig
from models.weights.checkpoint import Checkpoint
from models.weights.language import open_language
from models.weights.towers import open_vision
from models.weights.vlm_settings import VLMSettings
from models.weights.write.vlm import VLMParts
from tests.models.parity import hf_models, plain_eva

transformers = pytest.importorskip("transformers")

VOCABULARY, WORDS = 70, 61  # rows of the embedding, and tokens of the tokenizer
DIM, WIDTH, PATCH, IMAGE = 32, 24, 4, 12
GRID = ((12, 24), (24, 12), (24, 24))  # (width, height)
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": DIM, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 256,
}  # fmt: skip
TOWER = {
    "hidden_size": WIDTH, "num_attention_heads": 3, "num_hidden_layers": 6, "intermediate_size": 40,
    "patch_size": PATCH, "image_size": IMAGE,
}  # fmt: skip


def language_folder(folder: Path, family: str, *, head_bias: bool = False) -> Path:
    """A language model with a tokenizer, as its users have it."""
    kinds = {
        "llama": transformers.LlamaConfig, "phi": transformers.PhiConfig, "phi3": transformers.Phi3Config,
        "stablelm": transformers.StableLmConfig,
    }  # fmt: skip
    more: dict[str, Any] = {"use_qkv_bias": True} if family == "stablelm" else {}
    model = hf_models.language_model(kinds[family](**SHAPE, **more), seed=1)
    model.save_pretrained(folder)
    if family == "phi" and not head_bias:  # Bunny's Phi
        path = folder / "model.safetensors"
        held = {name: tensor.clone() for name, tensor in load_file(path).items() if name != "lm_head.bias"}
        save_file(held, path, metadata={"format": "pt"})
    tokenizer_files(folder)
    return folder


def tokenizer_files(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS - 3))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = template
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def tower_folder(folder: Path, family: str) -> Path:
    """A tower as its users have it: a folder, EVA's a file."""
    if family == "eva":
        shape = plain_eva.Shape(heads=1, layers=3, mlp=21, patch=PATCH, grid=IMAGE // PATCH)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(plain_eva.random_weights(shape, 2), folder / "eva.pt")
        return folder / "eva.pt"
    kinds = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}
    hf_models.tower(kinds[family](**TOWER), seed=2).save_pretrained(folder)
    return folder


def settings_of(tower: Path, **changes: Any) -> VLMSettings:
    return VLMSettings(**({"tower": str(tower), "projector": "mlp2x_gelu", "max_length": 128} | changes))


ANYRES: dict[str, Any] = {"merge": "spatial_unpad", "aspect_ratio": "anyres", "grid_pinpoints": GRID}


def origin_of(language: Path, tower: Path, settings: VLMSettings, **parts: Any) -> Origin:
    """A vision-language model of these files, with a random projector and, for anyres, a random image_newline."""
    vision = open_vision(tower, select_layer=settings.select_layer, select_feature=settings.select_feature)
    generator = torch.Generator().manual_seed(3)
    width = vision.config.width
    projector = {}
    for i, inside in enumerate((width, DIM)):
        projector[f"layers.{i}.weight"] = torch.randn(DIM, inside, generator=generator) * inside**-0.5
        projector[f"layers.{i}.bias"] = torch.randn(DIM, generator=generator)
    newline = torch.randn(DIM, generator=generator) if settings.merge == "spatial_unpad" else None
    return Origin(**(
        {"name": "made up", "stage": "full", "language": open_language(language), "vision": vision,
         "settings": settings, "projector": projector, "image_newline": newline, "base": str(language),
         "folders": [language]} | parts
    ))  # fmt: skip


def random_lora(origin: Origin, targets: tuple[str, ...]) -> LoRATensors:
    generator = torch.Generator().manual_seed(4)
    config = LoRAConfig(rank=3, alpha=7.0, targets=targets)
    tensors = {}
    for name in origin.language.names:
        linear = name.removesuffix(".weight")
        if name.startswith("layers.") and linear.split(".", 2)[2] in targets and name.endswith(".weight"):
            weight = origin.language.fetch(name)
            assert isinstance(weight, Tensor)
            rows, columns = weight.shape
            tensors[f"{linear}.lora.a"] = torch.randn(3, columns, generator=generator) * columns**-0.5
            tensors[f"{linear}.lora.b"] = torch.randn(rows, 3, generator=generator) * 0.3
    return LoRATensors(tensors=tensors, config=config)


def export_config(output: Path, **changes: Any) -> ExportConfig:
    return ExportConfig(**({"checkpoint": "made up", "output": str(output)} | changes))


def project(origin: Origin, features: Tensor) -> Tensor:
    """mlp2x_gelu in plain torch."""
    p = origin.projector
    hidden = F.gelu(F.linear(features, p["layers.0.weight"], p["layers.0.bias"]))
    return F.linear(hidden, p["layers.1.weight"], p["layers.1.bias"])


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of an opened checkpoint by part and name."""
    out: dict[str, Tensor] = {}
    for part in ("language", "vision"):
        source = getattr(checkpoint, part)
        if source is not None:
            out |= {f"{part}.{name}": tensor.clone() for name, tensor in source.stream()}
    parts: Mapping[str, Mapping[str, Tensor] | None] = {"projector": checkpoint.projector, "lora": checkpoint.lora}
    for part, tensors in parts.items():
        out |= {f"{part}.{name}": tensor for name, tensor in (tensors or {}).items()}
    if checkpoint.image_newline is not None:
        out["image_newline"] = checkpoint.image_newline
    return out


def origin_tensors(origin: Origin) -> dict[str, Tensor]:
    """The same of what was to be exported."""
    return tensors_of(Checkpoint(
        kind="vlm", language=origin.language, vision=origin.vision, projector=origin.projector,
        image_newline=origin.image_newline,
    ))  # fmt: skip


def assert_same_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and the same bits."""
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def parts_of(origin: Origin, *, vocabulary: int, said: Mapping[str, object] | None = None) -> VLMParts:
    """The parts of `origin`, whose language model is said to have `vocabulary` rows."""
    parts = vlm_parts(origin, torch.float32)
    language = replace(parts.language, config=replace(parts.language.config, vocab_size=vocabulary))
    without_pad = {key: value for key, value in parts.language.said.items() if key != "pad_token_id"}
    return replace(parts, language=replace(language, said=without_pad if said is None else said))
