"""Every real configuration on the meta device: as many parameters as its authors, or transformers' own class, have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from models.language.decoder import Decoder, DecoderConfig
from models.language.llama import LLAMA2_7B, LLAMA2_13B, LLAMA3_8B, LLAMA_7B, LLAMA_13B
from models.language.phi import PHI_1_5, PHI_2
from models.language.phi3 import PHI3_MINI
from models.language.stablelm import STABLELM_2_1_6B
from models.projector import ProjectorConfig, make_projector
from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336
from models.vision.eva import EVA02_CLIP_L_336
from models.vision.siglip import SIGLIP_SO400M_384
from models.vision.tower import TowerConfig, make_tower

transformers = pytest.importorskip("transformers")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def language_count(config: DecoderConfig, vocab_size: int | None = None) -> int:
    with torch.device("meta"):
        return count(Decoder(config if vocab_size is None else replace(config, vocab_size=vocab_size)))


def tower_count(config: TowerConfig) -> int:
    """Of the whole tower, with what is neither run nor held."""
    with torch.device("meta"):
        return count(make_tower(replace(config, select_layer=-1))) + behind_the_blocks(config)


def behind_the_blocks(config: TowerConfig) -> int:
    """A last norm; EVA's biased projection to 768 channels; SigLIP's probe, four products, norm and MLP that pool."""
    width, norm = config.width, 2 * config.width
    mlp = 2 * width * config.mlp_dim + config.mlp_dim + width
    head = {"clip": 0, "eva": (width + 1) * 768, "siglip": width + 4 * (width**2 + width) + norm + mlp}
    return norm + head[config.family]


def projector_count(vision: TowerConfig, language: DecoderConfig) -> int:
    with torch.device("meta"):
        return count(make_projector(ProjectorConfig(kind="mlp2x_gelu"), vision.width, language.dim))


# Open-LLaVA-NeXT's totals: language model + tower + mlp2x_gelu + image_newline.
@pytest.mark.parametrize(
    ("language", "vocab_size", "total"),
    [(LLAMA2_7B, 32000, 7_062_906_880), (LLAMA2_13B, 32000, 13_350_844_416), (LLAMA3_8B, 128257, 8_354_760_704)],
    ids=["vicuna-7b", "vicuna-13b", "llama3-8b"],
)
def test_open_llava_next(language: DecoderConfig, vocab_size: int, total: int) -> None:
    parts = language_count(language, vocab_size), tower_count(CLIP_L_14_336), projector_count(CLIP_L_14_336, language)
    assert sum(parts) + language.dim == total
    assert parts[1] == 303_507_456


LANGUAGE: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "llama-7b": (LLAMA_7B, {"model_type": "llama"}),
    "llama-13b": (LLAMA_13B, {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
                              "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40}),
    "llama3-8b": (LLAMA3_8B, {"model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8,
                              "vocab_size": 128256}),
    "phi-1.5": (PHI_1_5, {"model_type": "phi"}),
    "phi-2": (PHI_2, {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}),
    "phi-3-mini": (PHI3_MINI, {"model_type": "phi3"}),
    "stablelm-2-1.6b": (STABLELM_2_1_6B, {
        "model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352, "use_qkv_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_are_as_large_as_those_of_transformers(name: str) -> None:
    ours, settings = LANGUAGE[name]
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert language_count(ours) == count(theirs)


KNOWN = {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "phi-2": 2_779_683_840, "phi-3-mini": 3_821_079_552}


@pytest.mark.parametrize("name", KNOWN)
def test_published_counts(name: str) -> None:
    assert language_count(LANGUAGE[name][0]) == KNOWN[name]


def test_bunny_drops_the_bias_of_phis_head() -> None:
    assert language_count(replace(PHI_2, head_bias=False)) == KNOWN["phi-2"] - 51200


@pytest.mark.parametrize(
    ("ours", "kind", "settings"),
    [
        (CLIP_L_14_224, "CLIPVision", {"image_size": 224, "patch_size": 14}),
        (CLIP_L_14_336, "CLIPVision", {"image_size": 336, "patch_size": 14}),
        (SIGLIP_SO400M_384, "SiglipVision", {"image_size": 384, "patch_size": 14}),
    ],
    ids=["clip-224", "clip-336", "siglip"],
)
def test_towers_are_as_large_as_those_of_transformers(ours: TowerConfig, kind: str, settings: dict[str, int]) -> None:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=ours.width, intermediate_size=ours.mlp_dim, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads, **settings,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}Model")(config)
    assert tower_count(ours) == count(theirs)
    assert ours.tokens_out == {224: 6, 336: 576, 384: 729}[ours.image_size]


def test_eva() -> None:
    """24 blocks of four norms, attention without a key bias, three MLP products; a table, a last norm and a head."""
    width, mlp, tokens = 1024, 2730, 577
    attention = 4 * width * width + 3 * width
    block = 6 * width + 2 * mlp + attention + 3 * width * mlp + 2 * mlp + width
    tower = 3 * 14 * 14 * width + width + width + tokens * width + 24 * block
    assert tower_count(EVA02_CLIP_L_336) - tower == 2 * width + 768 * width + 768
    assert EVA02_CLIP_L_336.tokens_out == 576
