"""A run, opened to be exported: its base from the files that it was trained on, never from their 4-bit copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.architecture import model_of
from engine.checkpoint import load_checkpoint
from engine.config import Config, dataset_format
from engine.config_file import from_yaml
from engine.errors import CheckpointError, UsageError
from engine.export.lavin_args import lavin_args
from engine.export.origin import LoRATensors, MMATensors, Origin, Stage
from engine.projector_source import with_start
from engine.sources import Sources, base_paths, located, open_base, open_sources, start_path
from engine.starting import best_or_latest
from models.adapters.lora import LoRAConfig
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.identity import check_identity
from models.weights.names import check_shapes
from models.weights.vlm_settings import VLMSettings

PARTS = ("language", "vision", "projector")


def open_run(path: Path, base: str, vision: str, tokenizer: str) -> Origin:
    """The run (or the step of one) at `path`. `base` is where the folder of its language model has gone, if it has;
    `vision` what its tower will be called; `tokenizer` a folder.

    Raises:
        UsageError: it is no run directory.
        CheckpointError: it has no whole checkpoint, or its base is not there.
        WeightsError: the base is not the one that it was trained on, or its tensors are not those that train under its
            configuration (all listed).
    """
    run = path.parent if path.name.startswith("step-") else path
    config = _configuration(run)
    if base:
        config.model.language = base
    step = path if run != path else best_or_latest(run)
    if step is None or not step.is_dir():
        raise CheckpointError(f"{path} has no checkpoint", do="name a run directory that was trained, or a step of it")
    sources = _sources(config)
    tensors, state = load_checkpoint(step, only=["model"])
    check_identity(state["base"], sources.files)
    shape = model_of(config, sources)
    _require_trained(step, tensors, shape)
    return _origin(str(path), config, sources, shape, tensors, state, vision, tokenizer)


def _origin(
    name: str, config: Config, sources: Sources, shape: VLMConfig, tensors: Mapping[str, Tensor],
    state: Mapping[str, Any], vision: str, tokenizer: str,
) -> Origin:  # fmt: skip
    folder = located(base_paths(config)[0])
    whole = {part: _within(tensors, part) for part in PARTS}
    loras = {part: {n: t for n, t in whole[part].items() if ".lora." in n} for part in ("language", "vision")}
    plain = {
        part: {n: t for n, t in whole[part].items() if ".lora." not in n and "_adapter." not in n} for part in PARTS
    }
    has_mma = "mma" in (config.train.language, config.train.vision)
    return Origin(
        name=name, stage=_stage(config), language=sources.language, vision=sources.vision,
        language_trained=plain["language"], vision_trained=plain["vision"],
        language_lora=_lora(loras["language"], shape.lora), vision_lora=_lora(loras["vision"], shape.vision_lora),
        projector=plain["projector"] or sources.projector.tensors,
        image_newline=tensors.get("image_newline", sources.projector.image_newline),
        mma=MMATensors(tensors=tensors, epoch=_epoch(state), args=lavin_args(config)) if has_mma else None,
        settings=_settings(config, sources, folder, vision),
        template="scienceqa" if dataset_format(config) == "scienceqa" else "instruction",
        projector_lr=config.optim.lr, base=config.model.language or str(folder),
        folders=_folders(tokenizer or config.model.tokenizer, folder),
    )  # fmt: skip


def _sources(config: Config) -> Sources:
    folder = located(base_paths(config)[0])
    if not folder.is_dir():
        raise CheckpointError(
            f"the run's language model is not at {folder}", where="config.yaml of the run",
            do="name the folder where it is now with --base",
        )  # fmt: skip
    return open_sources(config)


def _configuration(run: Path) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{run} is no run directory", where="--run", why=f"{path} is not there",
                         do="give a checkpoint of another project as --checkpoint")  # fmt: skip
    return from_yaml(path)


def _require_trained(step: Path, tensors: Mapping[str, Tensor], shape: VLMConfig) -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(shape)
    expected = {name: tuple(p.shape) for name, p in model.trainable().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(step, found, expected, do="use the configuration of the run that wrote it (its config.yaml)")


def _within(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _lora(tensors: Mapping[str, Tensor], config: LoRAConfig) -> LoRATensors | None:
    return LoRATensors(tensors=tensors, config=config) if tensors else None


def _stage(config: Config) -> Stage:
    """What was trained: a language model with MMA makes the run LaVIN's, whatever the tower did."""
    trained = {config.train.language, config.train.vision}
    if "mma" in trained:
        return "mma"
    if "full" in trained or config.train.vision == "lora":  # a tower's LoRA is merged: it has no file of its own
        return "full"
    if config.train.language == "lora":
        return "lora"
    return "projector" if config.train.projector == "full" else "none"


def _epoch(state: Mapping[str, Any]) -> int:
    """The number in LaVIN's file name, whose epochs are counted from 0. (An epoch leaves out what fills no step.)"""
    seen, samples = int(state["counters"]["samples"]), int(state["samples"])
    return max(0, math.ceil(seen / samples) - 1)


def _settings(config: Config, sources: Sources, folder: Path, vision: str) -> VLMSettings:
    """How tower and language model are joined: what a checkpoint said at the start, config.yaml has recorded."""
    start, images = start_path(config), sources.images
    start = None if start is None else located(start)
    began, _ = with_start(config, open_base(config, folder), sources.language.config, start)
    feature = images.tower.select_feature
    return VLMSettings(
        tower=vision or _tower_name(config, sources, began.settings), projector=images.projector.kind,
        select_layer=images.tower.select_layer, select_feature="patch" if feature == "class_tokens" else feature,
        merge=images.merge, aspect_ratio=images.aspect_ratio, grid_pinpoints=images.pinpoints,
        scales=images.tower.scales,
        tower_trained=config.train.vision in ("full", "lora")
        or (began.settings is not None and began.settings.tower_trained),
        max_length=images.max_length,
    )  # fmt: skip


def _tower_name(config: Config, sources: Sources, settings: VLMSettings | None) -> str:
    """The tower as a person named it, in the run or in the checkpoint that it began with; else the checkpoint that
    holds it; else where it was found, a file or a folder."""
    if named := config.model.vision or ("" if settings is None else settings.tower):
        return named
    folder, found = base_paths(config)
    held = not {*sources.language.files}.isdisjoint(sources.vision.files)
    return str(folder if held or found is None else found)


def _folders(tokenizer: str, folder: Path) -> list[Path]:
    named = Path(tokenizer)
    first = [] if not tokenizer else [named if named.is_dir() else named.parent]
    return [*first, folder, folder.parent]
