"""preprocessor_config.json and processor_config.json of transformers' LLaVA: how pictures become tiles and tokens."""

from __future__ import annotations

from typing import Any

from models.weights.write.llava_hf import is_next, select_strategy, turned
from models.weights.write.tower import image_settings
from models.weights.write.vlm import VLMParts

IMAGE_TOKEN = "<image>"


def preprocessor_settings(parts: VLMParts) -> dict[str, Any]:
    """preprocessor_config.json: the tower's own image processor; LlavaNext's with the grid, (height, width); LLaVA's
    where pictures are padded to a square with the tower's mean colour."""
    out = image_settings(parts.tower.config)
    if is_next(parts):
        out |= {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": turned(parts.settings),
            "aspect_ratio_setting": "anyres", "do_pad": True,
        }  # fmt: skip
        if "crop_size" not in out:  # SigLIP's squashes: LlavaNext would crop to a default of its own
            out |= {"do_center_crop": False}
    elif parts.settings.aspect_ratio == "pad":
        out |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        if "crop_size" not in out:
            out |= {"do_center_crop": False}
    return out | {"processor_class": processor_class(parts)}


def processor_settings(parts: VLMParts) -> dict[str, Any]:
    """processor_config.json. A processor counts patches and adds `num_additional_image_tokens`, of which `default`
    takes one off again: the class token. With 0 there every picture would be a token short."""
    tower = parts.tower.config
    return {
        "processor_class": processor_class(parts), "image_token": IMAGE_TOKEN, "patch_size": tower.patch_size,
        "vision_feature_select_strategy": select_strategy(parts),
        "num_additional_image_tokens": int(tower.has_class_token),
    }  # fmt: skip


def processor_class(parts: VLMParts) -> str:
    return "LlavaNextProcessor" if is_next(parts) else "LlavaProcessor"
