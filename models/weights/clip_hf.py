"""CLIP's vision tower in Hugging Face's layout, of a CLIPModel or a CLIPVisionModel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from models.vision.clip import ClipConfig
from models.weights.hf_files import HfTensors
from models.weights.names import Names, check_shapes, tower_config, vision_shapes
from models.weights.settings import MOST_LAYERS, MOST_WIDTH, Settings, read_settings
from models.weights.source import VisionSource

NAMES = Names(
    outside={
        "patch_embed.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight", "pre_norm.weight": "pre_layrnorm.weight",
        "pre_norm.bias": "pre_layrnorm.bias",
    },
    layer="encoder.layers.{}.",
    modules={
        "attention_norm": "layer_norm1", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj", "attention.o": "self_attn.out_proj", "mlp_norm": "layer_norm2",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    },
)  # fmt: skip
PREFIX = "vision_model."  # absent where transformers 5 saved a CLIPVisionModel
IGNORED = re.compile(  # the text model, and what follows the tower's blocks
    r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale"
    r"|(vision_model\.)?(post_layernorm\..+|embeddings\.position_ids)"
)
MOST_PIXELS = 1 << 14  # a side


def open_hf_tower(folder: Path, files: Sequence[Path]) -> VisionSource:
    """The tower in `files`, described by the config.json in `folder`.

    Raises:
        WeightsError: config.json describes something else, or tensors are missing, unknown or of another shape.
    """
    settings = read_settings(folder / "config.json")
    config = _config(settings)
    tensors = HfTensors(files)
    found = {name: shape for name, shape in tensors.shapes.items() if not IGNORED.fullmatch(name)}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in found) else ""
    ours = {prefix + NAMES.of(name): name for name in vision_shapes(config)}
    shapes = vision_shapes(config)
    check_shapes(folder, found, {theirs: shapes[name] for theirs, name in ours.items()})

    def theirs(name: str) -> str:
        return prefix + NAMES.of(name)

    names = tuple(ours[name] for name in found)
    return VisionSource(
        config=config, files=(settings.path, *tensors.files), names=names,
        sizes={name: tensors.sizes[theirs(name)] for name in names},
        fetch=lambda name: tensors.fetch(theirs(name)), release=lambda name: tensors.release(theirs(name)),
        close=tensors.close, allocated=lambda name: False,
    )  # fmt: skip


def _config(settings: Settings) -> ClipConfig:
    """A CLIPModel's config.json keeps the tower under vision_config; absent keys have transformers' defaults."""
    settings.only("model_type", "clip", "clip_vision_model")
    tower = settings.inner("vision_config") or settings
    tower.only("hidden_act", "quick_gelu")
    tower.only("num_channels", 3)
    return tower_config(
        settings.path,
        width=tower.integer("hidden_size", most=MOST_WIDTH, default=768),
        num_layers=tower.integer("num_hidden_layers", most=MOST_LAYERS, default=12),
        num_heads=tower.integer("num_attention_heads", most=MOST_WIDTH, default=12),
        patch_size=tower.integer("patch_size", most=MOST_PIXELS, default=32),
        image_size=tower.integer("image_size", most=MOST_PIXELS, default=224),
        mlp_dim=tower.integer("intermediate_size", most=MOST_WIDTH, default=3072),
        norm_eps=tower.real("layer_norm_eps", default=1e-5),
    )
