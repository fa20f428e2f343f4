"""What CLIP's and SigLIP's towers have in common in transformers: names, settings, and the image processor's file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.vision.tower import TowerConfig
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.names import Names
from models.weights.settings import MOST_LAYERS, MOST_PIXELS, MOST_WIDTH, Settings
from models.weights.towers.layout import Layout, count_blocks

PREFIX = "vision_model."  # absent where transformers 5 saved a tower alone
NAMES = Names(
    outside={
        "patch_embed.weight": "embeddings.patch_embedding.weight",
        "patch_embed.bias": "embeddings.patch_embedding.bias",
        "class_embedding": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "pre_norm.weight": "pre_layrnorm.weight", "pre_norm.bias": "pre_layrnorm.bias",
    },
    layer="encoder.layers.{}.",
    modules={
        "attention_norm": "layer_norm1", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj", "attention.o": "self_attn.out_proj", "mlp_norm": "layer_norm2",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    },
)  # fmt: skip
FOREIGN = (  # the text model, what leads to the common space, and a table of numbers
    r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_(scale|bias)"
    r"|(vision_model\.)?embeddings\.position_ids"
)
UNUSED = r"vision_model.\g<0>"  # exports have the name that every version of transformers reads

# Blocks and heads of the published towers by (width, width of the MLP): weights alone do not say how many heads there
# are, nor how many blocks were deleted. All of OpenAI's CLIP and Google's SigLIP up to so400m.
PUBLISHED = {(768, 3072): (12, 12), (1024, 4096): (24, 16), (1152, 4304): (27, 16)}
UNEVEN_TILES = {(14, 27): 384}  # (patch, patches a side) -> pixels, where some fill no patch: SigLIP-so400m/14


def numbers(settings: Settings, *, norm_eps: float, patch_size: int) -> dict[str, Any]:
    """The fields of a TowerConfig in `settings`, a vision_config; absent keys have transformers' defaults."""
    settings.only("num_channels", 3)
    return {
        "width": settings.integer("hidden_size", most=MOST_WIDTH, default=768),
        "num_layers": settings.integer("num_hidden_layers", most=MOST_LAYERS, default=12),
        "num_heads": settings.integer("num_attention_heads", most=MOST_WIDTH, default=12),
        "patch_size": settings.integer("patch_size", most=MOST_PIXELS, default=patch_size),
        "image_size": settings.integer("image_size", most=MOST_PIXELS, default=224),
        "mlp_dim": settings.integer("intermediate_size", most=MOST_WIDTH, default=3072),
        "norm_eps": settings.real("layer_norm_eps", default=norm_eps),
    }


def published_numbers(where: Path, shapes: Mapping[str, Shape], layout: Layout, *, class_tokens: int) -> dict[str, Any]:
    """The same where there are no settings, from the shapes of one of the published towers.

    Raises:
        WeightsError: the tower is none of them.
    """
    wanted = {name: layout.of(name) for name in ("patch_embed.weight", "position_embedding", "layers.0.mlp.up.weight")}
    missing = [theirs for theirs in wanted.values() if theirs not in shapes]
    if missing:
        raise WeightsError(where, missing=missing)
    patches, positions, up = (shapes[theirs] for theirs in wanted.values())
    side = math.isqrt(max(positions[0] - class_tokens, 0)) if len(positions) == 2 else 0
    if len(patches) != 4 or len(up) != 2 or up[::-1] not in PUBLISHED or side**2 + class_tokens != positions[0]:
        found = [f"{theirs}: {'x'.join(map(str, shapes[theirs]))}" for theirs in wanted.values()]
        raise WeightsError(
            where, f"its tower has no config.json and is none of the published ones: {', '.join(found)}",
            do="put the tower's config.json beside it, or its settings under vision_config in the checkpoint's",
        )  # fmt: skip
    blocks, heads = PUBLISHED[up[1], up[0]]
    if count_blocks(shapes, layout) > blocks:
        raise WeightsError(where, f"has {count_blocks(shapes, layout)} blocks; a tower of width {up[1]} has {blocks}")
    patch = patches[-1]
    return {
        "width": up[1], "num_layers": blocks, "num_heads": heads, "patch_size": patch,
        "image_size": UNEVEN_TILES.get((patch, side), side * patch), "mlp_dim": up[0],
    }  # fmt: skip


def vision_config(config: TowerConfig, model_type: str, activation: str) -> dict[str, Any]:
    """The config.json of such a tower alone, as transformers reads it."""
    return {
        "model_type": model_type, "hidden_act": activation, "hidden_size": config.width,
        "intermediate_size": config.mlp_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "patch_size": config.patch_size, "image_size": config.image_size,
        "layer_norm_eps": config.norm_eps, "num_channels": 3, "attention_dropout": 0.0,
    }  # fmt: skip


def image_processor(config: TowerConfig, kind: str) -> dict[str, Any]:
    """preprocessor_config.json of transformers' image processor `kind`, for what this family was trained on."""
    size, trained_on = config.image_size, config.trained_on
    tile = {"height": size, "width": size}
    return {
        "image_processor_type": kind, "do_resize": True,
        "size": {"shortest_edge": size} if trained_on.crop else tile, "resample": 3,  # bicubic
        **({"do_center_crop": True, "crop_size": tile} if trained_on.crop else {}),
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(trained_on.mean),
        "image_std": list(trained_on.std), "do_convert_rgb": True,
    }  # fmt: skip
