"""transformers' LlavaForConditionalGeneration and LlavaNextForConditionalGeneration, which vLLM and SGLang serve too.

Tensors have the names of llava-hf's repositories, which every version of transformers reads (4.52 and newer rename them
when they load):

    language_model.model. ... , language_model.lm_head.weight
    multi_modal_projector.linear_{1,2}.{weight,bias}
    image_newline
    vision_tower.vision_model. ...

transformers counts (height, width) where LLaVA has (width, height): the grid's sizes are written turned round, so that
ties between two of them are decided as in training.
"""

from __future__ import annotations

from models.weights.vlm_settings import VLMSettings
from models.weights.write.entries import Entry, renamed
from models.weights.write.language import dtype_name, language_names, language_settings
from models.weights.write.llava import FormatError
from models.weights.write.tower import IN_TRANSFORMERS, tower_settings
from models.weights.write.vlm import TowerPart, VLMParts
from models.weights.write.vocabulary import with_rows

VOCABULARY = ("embed.weight", "head.weight", "head.bias")
PROJECTOR = {f"layers.{i}.{leaf}": f"linear_{i + 1}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
LANGUAGE, PROJECTOR_PREFIX, TOWER = "language_model.", "multi_modal_projector.", "vision_tower."


def is_next(parts: VLMParts) -> bool:
    """Whether it is LlavaNext: tiles of a grid, put together without their padding."""
    return parts.settings.merge == "spatial_unpad"


def require_expressible(parts: VLMParts) -> None:
    """Checks that transformers' two classes compute this model.

    Raises:
        FormatError: they do not; what they lack.
    """
    settings, tower = parts.settings, parts.tower.config.family
    if tower not in IN_TRANSFORMERS:
        raise FormatError(f"transformers has no class for a tower of {tower}")
    if settings.projector != "mlp2x_gelu":
        raise FormatError(f"transformers' LLaVA has the projector mlp2x_gelu, not {settings.projector}")
    if settings.scales:
        raise FormatError("transformers' LLaVA sees a picture at one size, not at several (S2)")
    if settings.merge == "spatial":
        raise FormatError("transformers puts tiles together as spatial_unpad or not at all, not as spatial")
    if is_next(parts) and (parts.image_newline is None or settings.aspect_ratio != "anyres"):
        raise FormatError(
            "transformers' LlavaNext has the tiles of anyres and an image_newline; this model has "
            f"{settings.aspect_ratio} and {'no' if parts.image_newline is None else 'an'} image_newline"
        )
    if not is_next(parts) and settings.aspect_ratio == "anyres":
        raise FormatError(f"transformers' LLaVA has one tile an image, not anyres with {settings.merge}")
    if is_next(parts) and settings.select_feature != "patch":
        raise FormatError(f"transformers' LlavaNext puts patches together, not {settings.select_feature}")


def hf_entries(parts: VLMParts, vocabulary: int) -> dict[str, Entry]:
    """Every tensor, with a vocabulary of `vocabulary` rows.

    Raises:
        FormatError: the head has a bias that is not zero, which transformers' LLaVA has no place for.
    """
    language = dict(parts.language.entries)
    if (bias := language.pop("head.bias", None)) is not None and bool(bias.read().any()):
        raise FormatError("transformers' LLaVA has no bias in the head, which this model has (Imp's format keeps it)")
    padded = {name: with_rows(e, vocabulary) if name in VOCABULARY else e for name, e in language.items()}
    out = renamed(language_names(padded, parts.language.config), LANGUAGE.__add__)
    out |= renamed(parts.projector, lambda name: PROJECTOR_PREFIX + PROJECTOR[name])
    if is_next(parts) and parts.image_newline is not None:
        out["image_newline"] = parts.image_newline
    return out | renamed(parts.tower.entries, TOWER.__add__)


def hf_settings(parts: VLMParts, vocabulary: int, image_token: int, ends: object) -> dict[str, object]:
    """config.json. `ends`: the id, or ids, that end an answer; None where nobody says."""
    settings, tower, dtype = parts.settings, parts.tower.config, parts.language.dtype
    text = language_settings(parts.language.config, parts.language.said, dtype) | {"vocab_size": vocabulary}
    if ends is not None:
        text["eos_token_id"] = ends
    name = "LlavaNext" if is_next(parts) else "Llava"
    out: dict[str, object] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if is_next(parts) else "llava",
        "image_token_index": image_token, "image_seq_length": tower.num_patches,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": feature_layer(parts.tower, settings),
        "vision_feature_select_strategy": select_strategy(parts), "tie_word_embeddings": False,
        "torch_dtype": dtype_name(dtype), "text_config": text,
        "vision_config": vision_settings(parts.tower),
    }  # fmt: skip
    out |= {"mm_vision_tower": settings.tower, "image_aspect_ratio": settings.aspect_ratio}  # for who converts it back
    if settings.max_length is not None:
        out["tokenizer_model_max_length"] = settings.max_length
    if is_next(parts):
        out |= {"image_grid_pinpoints": turned(settings), "use_image_newline_parameter": True}
    return out


def turned(settings: VLMSettings) -> list[list[int]]:
    """The grid's sizes as (height, width), in LLaVA's order."""
    return [[height, width] for width, height in settings.grid_pinpoints]


def select_strategy(parts: VLMParts) -> str:
    """`default` drops the first token, CLIP's class token; `full` keeps all: SigLIP has none, cls_patch wants it."""
    drops = parts.tower.config.has_class_token and parts.settings.select_feature == "patch"
    return "default" if drops else "full"


def feature_layer(tower: TowerPart, settings: VLMSettings) -> int:
    """The layer whose tokens are taken; the last one where the tower ends with it."""
    return settings.select_layer if tower.has_all_layers else -1


def vision_settings(tower: TowerPart) -> dict[str, object]:
    """config.json of the tower, with as many layers as there are tensors for."""
    out = tower_settings(tower.config)
    return out if tower.has_all_layers else out | {"num_hidden_layers": tower.config.layers_run}
