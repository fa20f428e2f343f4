"""A trained model, opened to be used: its base as the run's configuration says, with what the run trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.architecture import record
from engine.build import build_model, layout_of
from engine.config import Config, Runtime
from engine.config_file import from_yaml
from engine.data.images import TileReader
from engine.data.layout import Layout
from engine.data.tokenizer import Tokenizer
from engine.errors import CheckpointError, UsageError
from engine.pictures import processor
from engine.plan.unpacked_memory import use_memory
from engine.precision import choose_device, choose_dtype
from engine.sources import is_lora_folder, open_sources
from engine.starting import read_start
from kernels.dispatch import set_backend
from models.vlm import VisionLanguageModel

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Trained:
    """The model in evaluation mode, and what it takes to feed it."""

    config: Config
    model: VisionLanguageModel
    tokenizer: Tokenizer
    layout: Layout
    reader: TileReader
    device: torch.device
    weights: str  # where the trained tensors were read from


def run_config(run: str, runtime: Runtime) -> Config:
    """The configuration that a run directory was trained with, on this command's machine settings.

    Raises:
        UsageError: it is no run directory.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{run} is no run directory", where="--run", why=f"{path} is not there")
    config = from_yaml(path)
    config.runtime = runtime
    return config


def open_trained(config: Config, weights: Path) -> Trained:
    """Builds the base of `config` and puts the tensors of `weights` into it: a run, a step of one, LaVIN's file, or a
    LoRA folder."""
    if config.runtime.kernels != "auto":  # else NIBBLE_KERNELS may say
        set_backend(config.runtime.kernels)
    device = choose_device(config.runtime.device, 0)
    full = "full" in (config.train.language, config.train.vision)
    dtype, _ = choose_dtype(config.runtime.precision, device, full_training=full)
    sources = open_sources(config)
    shape = record(config, sources)
    start = read_start(shape, weights, sources.files)
    if is_lora_folder(weights) and not sources.projector.tensors and shape.projector.kind != "identity":
        raise CheckpointError(
            f"{weights} is a LoRA without a projector", why="between tower and language model it would be random",
            do="--model.projector_weights with the mm_projector.bin that was trained with it",
        )  # fmt: skip
    model = build_model(config, sources, device=device, dtype=dtype)
    start.put(model)
    model.eval()
    if unpacked := use_memory(config, model.language, device, dtype):
        logger.info("unpacked: %s", unpacked)
    reader = TileReader(processor(config, model.config))
    layout = layout_of(config, sources.tokenizer, model.config)
    return Trained(config, model, sources.tokenizer, layout, reader, device, str(start.source))
