"""Tiny shapes of every language model and tower, for all tests: they answer in milliseconds."""

from __future__ import annotations

from typing import Any

from models.language.decoder import DecoderConfig
from models.language.llama import LlamaConfig
from models.language.phi import PhiConfig
from models.language.phi3 import Phi3Config
from models.language.stablelm import StableLMConfig
from models.vision.clip import ClipConfig
from models.vision.eva import EvaConfig
from models.vision.siglip import SiglipConfig
from models.vision.tower import TowerConfig

VOCAB, DIM, HIDDEN = 67, 32, 48
WIDTH, SIDE = 24, 12
_LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCAB, "dim": DIM, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": HIDDEN,
}  # fmt: skip
_LANGUAGES: dict[str, tuple[type[DecoderConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),  # in Meta's order of q and k
    "llama-3": (LlamaConfig, {"num_kv_heads": 2, "rope_theta": 5e5, "rope_interleaved": False}),
    "phi": (PhiConfig, {"rotary_dim": 4}),
    "phi3": (Phi3Config, {}),
    "stablelm": (StableLMConfig, {"rotary_dim": 2}),
}
_TOWER: dict[str, Any] = {
    "width": WIDTH, "num_layers": 3, "num_heads": 3, "patch_size": 4, "image_size": SIDE, "mlp_dim": 40,
}  # fmt: skip
_TOWERS: dict[str, tuple[type[TowerConfig], dict[str, Any]]] = {
    "clip": (ClipConfig, {"select_feature": "patch"}),
    "eva": (EvaConfig, {}),
    "siglip": (SiglipConfig, {}),
}


def language(family: str, **changes: Any) -> DecoderConfig:
    """The language model of a family; "llama-3" is a LLaMA as Hugging Face's files hold it."""
    kind, own = _LANGUAGES[family]
    return kind(**_LANGUAGE | own | changes)


def tower(family: str, **changes: Any) -> TowerConfig:
    """3 x 3 patches. CLIP gives them too: LaVIN's class tokens need `select_feature` and six layers."""
    kind, own = _TOWERS[family]
    return kind(**_TOWER | own | changes)
