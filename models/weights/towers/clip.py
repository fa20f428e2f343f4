"""OpenAI's CLIP: in transformers' layout, and with OpenAI's own names, where q, k and v are one tensor [3W, W]."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.vision.clip import ClipConfig
from models.weights.archive import Archive, Shape, archive_of
from models.weights.errors import WeightsError
from models.weights.names import Names, Part
from models.weights.settings import Settings
from models.weights.towers import hugging_face
from models.weights.towers.family import Family, InTransformers
from models.weights.towers.layout import Layout, count_blocks
from models.weights.towers.selection import make_config

HF = Layout(
    names=hugging_face.NAMES, unused={r"post_layernorm\.(weight|bias)": hugging_face.UNUSED},
    foreign=hugging_face.FOREIGN,
)  # fmt: skip
EXPORT = replace(HF, prefix=hugging_face.PREFIX)
MODEL_TYPES = ("clip", "clip_vision_model")

OPENAI = Layout(
    names=Names(
        outside={
            "patch_embed.weight": "conv1.weight", "class_embedding": "class_embedding",
            "position_embedding": "positional_embedding", "pre_norm.weight": "ln_pre.weight",
            "pre_norm.bias": "ln_pre.bias",
        },
        layer="transformer.resblocks.{}.",
        modules={
            "attention_norm": "ln_1", "attention.o": "attn.out_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        parts={f"attention.{part}": Part(i) for i, part in enumerate("qkv")},
    ),
    leaves={f"attention.{part}.{leaf}": f"attn.in_proj_{leaf}" for part in "qkv" for leaf in ("weight", "bias")},
    unused={r"ln_post\.(weight|bias)": r"vision_model.post_layernorm.\1"},
    foreign=(  # the text model, what leads to the common space, and numbers
        r"visual\.proj|transformer\..+|token_embedding\.weight|positional_embedding|ln_final\..+"
        r"|text_projection|logit_scale|input_resolution|context_length|vocab_size"
    ),
    prefix="visual.",
)  # fmt: skip
HEAD_DIM = 64  # of every CLIP of OpenAI's; their files do not say
OPENAI_SHA256 = {  # of their archives of ViT-L/14
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L-14.pt",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336px.pt",
}


def config_of(settings: Settings, **selection: Any) -> ClipConfig:
    """The tower in a CLIPModel's config.json (under vision_config) or a CLIPVisionModel's.

    Raises:
        WeightsError: another model, or a number out of range.
    """
    settings.only("model_type", *MODEL_TYPES)
    tower = settings.inner("vision_config") or settings
    tower.only("model_type", *MODEL_TYPES)
    tower.only("hidden_act", "quick_gelu")
    numbers = hugging_face.numbers(tower, norm_eps=1e-5, patch_size=32)
    return make_config(ClipConfig, settings.path, numbers | selection)


def published_config(where: Path, shapes: Mapping[str, Shape], layout: Layout, **selection: Any) -> ClipConfig:
    """The tower of a checkpoint that does not describe it: one of OpenAI's."""
    numbers = hugging_face.published_numbers(where, shapes, layout, class_tokens=1)
    return make_config(ClipConfig, where, numbers | selection)


def openai_config(where: Path, shapes: Mapping[str, Shape], **selection: Any) -> ClipConfig:
    """OpenAI's files have no settings: every number is in a shape."""
    names = [OPENAI.of(name) for name in ("patch_embed.weight", "position_embedding", "layers.0.mlp.up.weight")]
    missing = [name for name in names if name not in shapes]
    if missing:
        raise WeightsError(where, "has no vision transformer (is it a ResNet?)", missing=missing)
    patches, positions, up = (shapes[name] for name in names)
    side = math.isqrt(max(positions[0] - 1, 0)) if positions else 0
    if len(patches) != 4 or len(up) != 2 or positions != (side * side + 1, patches[0]):
        found = [f"{name}: {shapes[name]}" for name in names]
        raise WeightsError(where, "has no vision transformer of square tiles", mismatched=found)
    numbers = {
        "width": patches[0], "num_layers": count_blocks(shapes, OPENAI), "num_heads": patches[0] // HEAD_DIM,
        "patch_size": patches[-1], "image_size": side * patches[-1], "mlp_dim": up[0],
    }  # fmt: skip
    return make_config(ClipConfig, where, numbers | selection)


def settings_of(config: ClipConfig) -> dict[str, Any]:
    """The config.json of a CLIPVisionModel, and the vision_config of what holds one."""
    return hugging_face.vision_config(config, "clip_vision_model", "quick_gelu") | {"projection_dim": 768}


def preprocessor_of(config: ClipConfig) -> dict[str, Any]:
    """The preprocessor_config.json of CLIP's image processor."""
    return hugging_face.image_processor(config, "CLIPImageProcessor")


FAMILY = Family(config=ClipConfig, export=EXPORT, in_transformers=InTransformers(
    model_types=MODEL_TYPES, settings_of=settings_of, preprocessor_of=preprocessor_of,
))  # fmt: skip


def open_program(path: Path) -> Archive:
    """The tensors of an archive of OpenAI's (ViT-L-14.pt), all in memory. It is a TorchScript program, and opening a
    program can run it: it is opened only if it is theirs to the last bit.

    Raises:
        WeightsError: any other program.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in OPENAI_SHA256:
        accepted = " and ".join(f"{name} ({sha256})" for sha256, name in OPENAI_SHA256.items())
        raise WeightsError(
            path, f"is a TorchScript program with sha256 {digest}; accepted are OpenAI's {accepted}",
            do="download the file again, or name the folder of openai/clip-vit-large-patch14 (or -patch14-336) from "
            "Hugging Face",
        )  # fmt: skip
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch wishes that nobody wrote such files any more
        return archive_of(path, dict(jit.load(path, map_location="cpu").state_dict()))
