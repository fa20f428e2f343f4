"""The formats, one function each: what is written into the new folder, and how many bytes of weights that are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import UsageError
from engine.export.assemble import language_part, vlm_parts
from engine.export.config import ExportConfig, shard_bytes
from engine.export.dtypes import export_dtype, tower_dtype
from engine.export.folder import write_json
from engine.export.origin import Origin
from engine.export.refusals import KEEP, require_no_mma, why_not_lavin
from engine.export.tokenizer_files import copy_tokenizer
from engine.tensor_file import TensorWriter
from models.weights.lavin import write_lavin_adapters
from models.weights.lora_files import write_peft
from models.weights.settings import read_settings
from models.weights.write.adapters import write_non_lora, write_projector_file
from models.weights.write.entries import Entries, Entry, size_of, tensor_entries
from models.weights.write.generation import generation_settings
from models.weights.write.language import guesses, language_names, language_settings
from models.weights.write.llava import (
    NEWLINE,
    TOWER,
    FormatError,
    Project,
    llava_entries,
    llava_settings,
    project_of,
    projector_entries,
    tower_entries,
    why_not,
)  # fmt: skip
from models.weights.write.shards import write_shards
from models.weights.write.vlm import LanguagePart, VLMParts

GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """An export before anything is written: its bytes of weights, what writes it into a folder, and what was taken for
    granted, a sentence each."""

    size: int
    write: Callable[[Path], None]
    notes: Sequence[str] = ()


def plan_hf(origin: Origin, config: ExportConfig) -> Plan:
    """The language model as transformers reads it."""
    part = language_part(origin, export_dtype(origin, config.dtype))
    entries = language_names(part.entries, part.config)
    if part.config.family == "phi" and not part.config.head_bias:  # transformers' Phi has one; Bunny's does not
        entries["lm_head.bias"] = _zeros(part.config.vocab_size, part.dtype)

    def write(folder: Path) -> None:
        write_model(folder, entries, language_settings(part.config, part.said, part.dtype), config)
        _beside(folder, origin, part)

    return Plan(size_of(entries), write, guesses(part.config, part.said))


def plan_merged(origin: Origin, config: ExportConfig) -> Plan:
    """The whole model in LLaVA's, Bunny's or Imp's format; a language model alone as transformers reads it."""
    if origin.settings is None:
        return plan_hf(origin, config)
    parts = vlm_parts(origin, export_dtype(origin, config.dtype))
    project = _project(parts, config)
    entries = llava_entries(parts)

    def write(folder: Path) -> None:
        write_model(folder, entries, llava_settings(parts, project, projector_lr=origin.projector_lr), config)
        _beside(folder, origin, parts.language)

    return Plan(size_of(entries), write, guesses(parts.language.config, parts.language.said))


def plan_llava(origin: Origin, config: ExportConfig) -> Plan:
    """What LLaVA, Bunny or Imp leave at the end of this kind of training: a projector, a LoRA, or the whole model."""
    if origin.stage == "projector":
        return _plan_projector(origin, config)
    return plan_peft(origin, config) if origin.stage == "lora" else plan_merged(origin, config)


def plan_peft(origin: Origin, config: ExportConfig) -> Plan:
    """The LoRA as PEFT reads it; of a vision-language model with config.json and what was trained beside it."""
    lora = origin.language_lora
    if lora is None:
        require_no_mma(origin, ("language", "vision"))
        raise UsageError(f"{origin.name} has no LoRA", where="--to peft", do="--to merged writes the whole model")
    if origin.vision_lora is not None:
        raise UsageError(
            f"{origin.name} has a LoRA in its tower", where="--to peft",
            why="LLaVA and Bunny read one in the language model alone", do="--to merged adds both to the weights",
        )  # fmt: skip
    dtype = export_dtype(origin, config.dtype)
    tensors = {name: tensor if config.dtype == "auto" else tensor.to(dtype) for name, tensor in lora.tensors.items()}
    parts = None if origin.settings is None else vlm_parts(origin, dtype, merged=False)
    project = None if parts is None else _project(parts, config)
    beside = {} if parts is None else _as_trained(origin, parts, config)

    def write(folder: Path) -> None:
        write_peft(folder, tensors, origin.language.config, lora.config, base=origin.base)
        if parts is not None and project is not None:
            write_non_lora(folder, beside)
            settings = llava_settings(parts, project, projector_lr=origin.projector_lr)
            write_json(folder / "config.json", settings)
        copy_tokenizer(origin.folders, folder)

    notes = [] if parts is None else guesses(parts.language.config, parts.language.said)
    return Plan(sum(tensor.nbytes for tensor in tensors.values()) + size_of(beside), write, notes)


def plan_lavin(origin: Origin, config: ExportConfig) -> Plan:
    """MMA adapters, projector and modality embedding as LaVIN's checkpoint-N.pth."""
    mma, reason = origin.mma, why_not_lavin(origin)
    if mma is None or reason:
        do = "--to llava or --to merged writes it" if mma is None else KEEP
        raise UsageError(f"LaVIN's format cannot say {origin.name}", where="--to lavin", why=reason, do=do)
    return Plan(
        sum(tensor.numel() * 4 for tensor in mma.tensors.values()),
        lambda folder: write_lavin_adapters(
            folder / f"checkpoint-{mma.epoch}.pth", mma.tensors, epoch=mma.epoch, args=mma.args, module_prefix=True
        ),
    )  # fmt: skip


def write_model(folder: Path, entries: Entries, settings: Mapping[str, object], config: ExportConfig) -> None:
    """The shards with their index, and config.json."""
    write_shards(folder, entries, TensorWriter, largest=shard_bytes(config))
    write_json(folder / "config.json", settings)


def generation_of(origin: Origin, part: LanguagePart, ends_with: int | None = None) -> dict[str, object]:
    """generation_config.json: the source's, put right."""
    file = next((folder / GENERATION for folder in origin.folders if (folder / GENERATION).is_file()), None)
    said = None if file is None else read_settings(file).values
    return generation_settings(said, language_settings(part.config, part.said, part.dtype), answers_end_with=ends_with)


def _beside(folder: Path, origin: Origin, part: LanguagePart) -> None:
    write_json(folder / GENERATION, generation_of(origin, part))
    copy_tokenizer(origin.folders, folder)


def _plan_projector(origin: Origin, config: ExportConfig) -> Plan:
    parts = vlm_parts(origin, export_dtype(origin, config.dtype), merged=False)
    project = _project(parts, config)
    entries = _as_trained(origin, parts, config)

    def write(folder: Path) -> None:
        write_projector_file(folder, {name: e for name, e in entries.items() if not name.startswith(TOWER)})
        settings = llava_settings(parts, project, projector_only=True, projector_lr=origin.projector_lr)
        write_json(folder / "config.json", settings)

    return Plan(size_of(entries), write, guesses(parts.language.config, parts.language.said))


def _as_trained(origin: Origin, parts: VLMParts, config: ExportConfig) -> dict[str, Entry]:
    """Projector, image_newline and a trained tower under LLaVA's names, in `parts`' dtype where --dtype names it; else
    as they were trained, and the tower as its files have it."""
    tower = tower_entries(parts) if parts.settings.tower_trained else {}
    projector, newline = dict(parts.projector), parts.image_newline
    if config.dtype == "auto":
        projector = tensor_entries(origin.projector)
        newline = None if origin.image_newline is None else tensor_entries({"": origin.image_newline})[""]
        tower = {name: replace(entry, dtype=tower_dtype(origin)) for name, entry in tower.items()}
    out = projector_entries(projector, parts.settings.projector)
    return out | ({} if newline is None else {NEWLINE: newline}) | tower


def _zeros(rows: int, dtype: torch.dtype) -> Entry:
    return Entry((rows,), dtype, lambda: torch.zeros(rows, dtype=dtype))


def _project(parts: VLMParts, config: ExportConfig) -> Project:
    tower = parts.tower.config.family
    if config.project == "auto":
        return project_of(parts.language, tower, parts.settings)
    if reason := why_not(config.project, parts.language, tower, parts.settings):
        raise FormatError(f"{config.project} {reason}")
    return config.project
