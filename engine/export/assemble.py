"""From what was opened to the parts that a format is made of: LoRA merged, trained tensors in their places."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.errors import UsageError
from engine.export.origin import LoRATensors, Origin
from engine.export.refusals import require_llava_projector, require_no_mma, require_not_quantized
from models.weights.names import language_shapes
from models.weights.settings import read_settings
from models.weights.source import LanguageSource
from models.weights.split import text_settings
from models.weights.towers.layout import tower_shapes
from models.weights.write.entries import Entry, source_entries, tensor_entries
from models.weights.write.merge import merge_lora
from models.weights.write.tower import tower_part
from models.weights.write.vlm import LanguagePart, TowerPart, VLMParts


def language_part(origin: Origin, dtype: torch.dtype, *, merged: bool = True) -> LanguagePart:
    """The language model in `dtype`; `merged`: with its LoRA added to its weights, which then are to be written.

    Raises:
        UsageError: it has MMA adapters, which cannot be added to weights, or its files are quantized.
        WeightsError: the LoRA is of another model.
    """
    require_no_mma(origin, ("language",))
    if merged:
        require_not_quantized(origin.language)
    shapes = language_shapes(origin.language.config)
    entries: dict[str, Entry] = source_entries(origin.language, shapes, dtype)
    entries |= tensor_entries(origin.language_trained, dtype)
    entries = _merged(entries, origin.language_lora if merged else None, origin.name)
    said = said_settings(origin.language)
    return LanguagePart(config=origin.language.config, entries=entries, dtype=dtype, said=said)


def vlm_parts(origin: Origin, dtype: torch.dtype, *, merged: bool = True) -> VLMParts:
    """The whole vision-language model in `dtype`; `merged`: with the language model's LoRA added to its weights.

    Raises:
        UsageError: it is a language model alone, or LaVIN's.
        WeightsError: the LoRA is of another model.
    """
    require_no_mma(origin, ("language", "vision"))
    if origin.settings is None or origin.vision is None:
        raise UsageError(
            f"{origin.name} is a language model without a tower", where="--to", do="--to hf, or --to peft for a LoRA"
        )
    require_llava_projector(origin)
    newline = None if origin.image_newline is None else tensor_entries({"": origin.image_newline}, dtype)[""]
    return VLMParts(
        language=language_part(origin, dtype, merged=merged), tower=_tower(origin, dtype),
        projector=tensor_entries(origin.projector, dtype), image_newline=newline, settings=origin.settings,
    )  # fmt: skip


def said_settings(language: LanguageSource) -> Mapping[str, object]:
    """What the config.json beside the language model's weights says; empty for Meta's files."""
    path = next((file for file in language.files if file.name == "config.json"), None)
    return {} if path is None else text_settings(read_settings(path)).values


def _tower(origin: Origin, dtype: torch.dtype) -> TowerPart:
    vision = origin.vision
    assert vision is not None
    entries: dict[str, Entry] = source_entries(vision, tower_shapes(vision.config), dtype)
    entries |= tensor_entries(origin.vision_trained, dtype)
    return tower_part(vision, _merged(entries, origin.vision_lora, origin.name), dtype)


def _merged(entries: dict[str, Entry], lora: LoRATensors | None, name: str) -> dict[str, Entry]:
    if lora is None:
        return entries
    do = "name the language model that it was trained on with --base"
    return merge_lora(entries, lora.tensors, lora.config, name, do=do)
