"""From what was opened to the parts that a format is made of: LoRA merged, trained tensors in their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UsageError
from engine.export.config import Precision
from engine.export.origin import LoRATensors, Origin
from models.weights.names import language_shapes
from models.weights.parts import language_settings as language_inner
from models.weights.settings import read_settings
from models.weights.source import LanguageSource
from models.weights.towers.layout import tower_shapes
from models.weights.write.entries import NOT_QUANTIZED, Entry, source_entries, tensor_entries
from models.weights.write.merge import merge_lora
from models.weights.write.parts import LanguagePart, TowerPart, VLMParts
from models.weights.write.tower import tower_part

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TO_LAVIN = "--to lavin writes its adapters as LaVIN's own eval.py and demo.py read them"
KEEP = "no other project has this model: chat.py, serve.py and eval.py read the run itself"


def export_dtype(origin: Origin, said: Precision) -> torch.dtype:
    """The dtype of written weights: the flag's, else that of the base's files."""
    if said != "auto":
        return DTYPES[said]
    embedding = origin.language.fetch("embed.weight")
    assert isinstance(embedding, Tensor)  # no format quantizes it
    return embedding.dtype


def tower_dtype(origin: Origin) -> torch.dtype:
    """The dtype of the tower's files."""
    assert origin.vision is not None
    return origin.vision.fetch("patch_embed.weight").dtype


def language_part(origin: Origin, dtype: torch.dtype, *, merged: bool = True) -> LanguagePart:
    """The language model in `dtype`; `merged`: with its LoRA added to its weights, which then are to be written.

    Raises:
        UsageError: it has MMA adapters, which cannot be added to weights, or its files are quantized.
        WeightsError: the LoRA is of another model.
    """
    require_no_mma(origin, ("language",))
    if merged:
        _require_not_quantized(origin.language)
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
    require_llava_seam(origin)
    newline = None if origin.image_newline is None else tensor_entries({"": origin.image_newline}, dtype)[""]
    return VLMParts(
        language=language_part(origin, dtype, merged=merged), tower=_tower(origin, dtype),
        projector=tensor_entries(origin.projector, dtype), image_newline=newline, settings=origin.settings,
    )  # fmt: skip


def require_llava_seam(origin: Origin) -> None:
    """Checks that tower and language model are joined as LLaVA, Bunny and Imp can say it.

    Raises:
        UsageError: by LaVIN's projector, or its class tokens.
    """
    assert origin.settings is not None and origin.vision is not None
    kind, feature = origin.settings.projector, origin.vision.config.select_feature
    if kind == "lavin" or feature == "class_tokens":
        raise UsageError(
            f"{origin.name} has a {kind} projector of {feature}", where="--to",
            why="LLaVA, Bunny, Imp and transformers have other projectors, of patches",
            do=KEEP if why_not_lavin(origin) else TO_LAVIN,
        )  # fmt: skip


def why_not_lavin(origin: Origin) -> str:
    """What keeps this model out of LaVIN's format; empty where nothing does."""
    if origin.mma is None:
        return "it has no MMA adapters"
    assert origin.settings is not None and origin.vision is not None  # MMA comes from runs, which have both
    language, vision = origin.language.config.family, origin.vision.config
    if (language, vision.family, vision.select_feature) != ("llama", "clip", "class_tokens"):
        return f"LaVIN has LLaMA and CLIP's class tokens, not {language} and {vision.family}'s {vision.select_feature}"
    projector = origin.settings.projector
    return "" if projector == "lavin" else f"LaVIN has a projector of its own, not {projector}"


def require_no_mma(origin: Origin, parts: Sequence[str]) -> None:
    """Checks that `parts` (language, vision) have no MMA adapters.

    Raises:
        UsageError: they have.
    """
    adapted = [] if origin.mma is None else [part for part in parts if any(
        name.startswith(f"{part}.") and "_adapter." in name for name in origin.mma.tensors
    )]  # fmt: skip
    if adapted:
        raise UsageError(
            f"{origin.name} has MMA adapters in its {' and '.join(adapted)}", where="--to",
            why="a router mixes them token by token: they cannot be added to weights, and no other format knows them",
            do=KEEP if why_not_lavin(origin) else TO_LAVIN,
        )  # fmt: skip


def said_settings(language: LanguageSource) -> Mapping[str, object]:
    """What the config.json beside the language model's weights says; empty for Meta's files."""
    path = next((file for file in language.files if file.name == "config.json"), None)
    return {} if path is None else language_inner(read_settings(path)).values


def size_of(entries: Mapping[str, Entry]) -> int:
    """Bytes that the weights take on the disk."""
    return sum(entry.bytes for entry in entries.values())


def first_file(folders: Iterable[Path], name: str) -> Path | None:
    """The file of this name in the first folder that has one."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _tower(origin: Origin, dtype: torch.dtype) -> TowerPart:
    vision = origin.vision
    assert vision is not None
    entries: dict[str, Entry] = source_entries(vision, tower_shapes(vision.config), dtype)
    entries |= tensor_entries(origin.vision_trained, dtype)
    return tower_part(vision, _merged(entries, origin.vision_lora, origin.name), dtype)


def _merged(entries: dict[str, Entry], lora: LoRATensors | None, name: str) -> dict[str, Entry]:
    return entries if lora is None else merge_lora(entries, lora.tensors, lora.config, name)


def _require_not_quantized(language: LanguageSource) -> None:
    """A look at the first layer and the head: formats quantize all linears or none."""
    looked = [name for name in language.names if name.startswith(("layers.0.", "head.")) and name.endswith("weight")]
    if any(not isinstance(language.fetch(name), Tensor) for name in looked):
        raise UsageError(
            f"the weights in {language.files[0].parent} are quantized", where="the base's files", do=NOT_QUANTIZED
        )
