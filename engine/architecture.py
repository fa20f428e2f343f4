"""Which model a configuration describes, once its weights are opened: what `auto` and None stand for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import Config, trained_vision
from engine.errors import UsageError
from engine.image_choices import ImageChoices, record_images
from engine.projector_source import ProjectorSource
from engine.sources import Sources, lora_start
from models.adapters.lora import LoRAConfig
from models.adapters.mma import AdapterConfig
from models.language.decoder import DecoderConfig
from models.language.llama import LLAMA_13B
from models.projector import make_projector
from models.vlm import Legacy, VLMConfig
from models.weights.lavin import read_lavin_args
from models.weights.lora_files import peft_names, read_peft
from models.weights.names import check_shapes, shapes_of

logger = logging.getLogger("nibble")


def vlm_config(
    config: Config, language: DecoderConfig, images: ImageChoices, projector: ProjectorSource | None = None
) -> VLMConfig:
    """The model that this configuration describes; `projector`: the weights that it starts from.

    Raises:
        UsageError: these parts do not go together.
        WeightsError: the projector's weights are of another width.
    """
    _check_placement(config, language)
    _check_projector(language, images, projector or ProjectorSource())
    lora = lora_config(config, language)
    return VLMConfig(
        language=language,
        vision=images.tower,
        projector=images.projector,
        adapter=AdapterConfig(
            dim=config.adapter.dim, scale=config.adapter.scale,
            temperature=router_temperature(config, language), dropout=config.adapter.dropout,
        ),
        lora=lora,
        vision_lora=_with_flags(config, lora) if config.train.vision == "lora" else LoRAConfig(),
        language_placement=config.adapter.language,
        vision_placement=config.adapter.vision,
        train_language=config.train.language,
        train_vision=trained_vision(config),
        train_projector=config.train.projector,
        image_newline=images.has_newline,
        drop_path=config.model.drop_path,
        legacy=Legacy(
            clip_router=config.legacy.clip_router,
            normal_adapter=config.legacy.normal_adapter,
            block_routing=config.legacy.block_routing,
        ),
    )  # fmt: skip


def model_of(config: Config, sources: Sources) -> VLMConfig:
    """The model that this configuration describes on these files; errors as vlm_config."""
    return vlm_config(config, sources.language.config, sources.images, sources.projector)


def record(config: Config, sources: Sources) -> VLMConfig:
    """Writes what was found in files into the configuration, as the run's config.yaml keeps it: the run can be opened
    without them. Returns the model.

    Raises:
        UsageError: as vlm_config; or nothing trains.
    """
    shape = model_of(config, sources)
    frozen = (shape.train_language, shape.train_vision) == ("frozen", "frozen")
    if frozen and shape.projector.kind == "identity" and not shape.image_newline:
        raise UsageError("nothing trains", where="--train", why="the projector is an identity, which has no weights")
    config.train.vision = shape.train_vision
    config.adapter.temperature = shape.adapter.temperature
    record_images(config, sources.images)
    if config.train.projector == "frozen" and not sources.projector.tensors and shape.projector.kind != "identity":
        logger.warning("the projector is frozen and nothing named has weights for it: it stays as it is drawn")
    if config.train.language == "lora":
        config.lora.rank, config.lora.alpha = shape.lora.rank, shape.lora.alpha
        config.lora.targets = ",".join(shape.lora.targets)
    return shape


def _check_placement(config: Config, language: DecoderConfig) -> None:
    if config.train.language == "mma" and config.adapter.language == "block" and language.parallel:
        raise UsageError(
            f"adapter.language block with a {language.family} model", where="--adapter.language",
            why="its attention and its MLP share one norm", do="--adapter.language attn",
        )  # fmt: skip


def _check_projector(language: DecoderConfig, images: ImageChoices, source: ProjectorSource) -> None:
    width = images.tower.feature_width
    try:
        with torch.device("meta"):
            made = make_projector(images.projector, width, language.dim)
    except ValueError as error:
        raise UsageError(str(error), where="--model.projector") from error
    if source.tensors:  # now, and not when the base is loaded
        found = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
        check_shapes(
            source.path, found, shapes_of(made),
            do=f"it takes the tower's {width} channels and gives the language model's {language.dim}: name the two "
            "that it was trained with",
        )  # fmt: skip


def router_temperature(config: Config, language: DecoderConfig) -> float:
    """The flag where it is given, else what LaVIN's adapter file says it was trained with, else LaVIN's choice for a
    model of this size. It is in none of the tensors."""
    if config.adapter.temperature is not None:
        return config.adapter.temperature
    file = Path(config.adapter.init)
    recorded = read_lavin_args(file).get("temperature") if config.adapter.init and file.is_file() else None
    if isinstance(recorded, int | float):
        return float(recorded)
    return 5.0 if language.dim >= LLAMA_13B.dim else 10.0


def lora_config(config: Config, language: DecoderConfig) -> LoRAConfig:
    """The language model's: the flags where they are given, else what the LoRA folder of --adapter.init was trained
    with, else our defaults.

    Raises:
        UsageError: a target is no linear of this language model's blocks.
    """
    if config.train.language != "lora":
        return LoRAConfig()
    folder, with_tower = lora_start(config), config.train.vision == "lora"
    trained_with = LoRAConfig() if folder is None else read_peft(folder, language, with_tower=with_tower)[1]
    targets = _our_names(config.lora.targets, language) if config.lora.targets else trained_with.targets
    return replace(_with_flags(config, trained_with), targets=targets)


def _with_flags(config: Config, trained_with: LoRAConfig) -> LoRAConfig:
    """`trained_with` with what flags say instead, on all linears."""
    return LoRAConfig(
        rank=config.lora.rank or trained_with.rank,
        alpha=config.lora.alpha or trained_with.alpha,
        dropout=config.lora.dropout,
    )


def _our_names(targets: str, language: DecoderConfig) -> tuple[str, ...]:
    """`q_proj, attention.v` -> attention.q, attention.v: the field's names or ours, in any mixture."""
    theirs = {name.rpartition(".")[2]: ours for ours, name in peft_names(language).items()}
    wanted = [target.strip() for target in targets.split(",")]
    unknown = [target for target in wanted if target not in theirs and target not in theirs.values()]
    if unknown:
        raise UsageError(
            f"lora.targets names no linear of a {language.family} block: {', '.join(unknown)}",
            where="--lora.targets", do=f"choose among {', '.join(theirs)} (or {', '.join(theirs.values())})",
        )  # fmt: skip
    return tuple(dict.fromkeys(theirs.get(target, target) for target in wanted))
