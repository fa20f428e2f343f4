"""Which model a configuration describes, once its weights are opened: what `auto` and None stand for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import Config, trained_vision
from engine.errors import UsageError
from engine.neck import Neck
from engine.pictures import has_newline, record_length, record_pictures
from engine.sources import Sources, is_lora_folder
from models.adapters.lora import LoRAConfig
from models.adapters.mma import AdapterConfig
from models.language.decoder import DecoderConfig
from models.language.llama import LLAMA_13B
from models.projector import ProjectorConfig, make_projector
from models.vision.tower import TowerConfig
from models.vlm import Legacy, VLMConfig
from models.weights.lavin import read_lavin_args
from models.weights.lora_files import peft_names, read_peft
from models.weights.names import check_shapes, shapes_of

logger = logging.getLogger("nibble")

DEFAULT_PROJECTOR = "mlp2x_gelu"


def vlm_config(config: Config, language: DecoderConfig, vision: TowerConfig, neck: Neck | None = None) -> VLMConfig:
    """The model that this configuration describes; `neck`: what the sources say of the seam.

    Raises:
        UsageError: these parts do not go together.
    """
    neck = Neck() if neck is None else neck
    _check_placement(config, language)
    lora = lora_config(config, language)
    return VLMConfig(
        language=language,
        vision=vision,
        projector=_projector(config, language, vision, neck),
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
        image_newline=has_newline(config, neck.pictures),
        drop_path=config.model.drop_path,
        legacy=Legacy(
            clip_router=config.legacy.clip_router,
            normal_adapter=config.legacy.normal_adapter,
            block_routing=config.legacy.block_routing,
        ),
    )  # fmt: skip


def record(config: Config, sources: Sources) -> VLMConfig:
    """Writes what was found in files into the configuration, as the run's config.yaml keeps it: the run can be opened
    without them. Returns the model.

    Raises:
        UsageError: as vlm_config; or nothing trains.
    """
    shape = vlm_config(config, sources.language.config, sources.vision.config, sources.neck)
    frozen = (shape.train_language, shape.train_vision) == ("frozen", "frozen")
    if frozen and shape.projector.kind == "identity" and not shape.image_newline:
        raise UsageError("nothing trains", where="--train", why="the projector is an identity, which has no weights")
    config.train.vision = shape.train_vision
    config.adapter.temperature = shape.adapter.temperature
    config.model.projector = shape.projector.kind
    if shape.vision.select_feature != "class_tokens":
        config.model.select_layer, config.model.select_feature = shape.vision.select_layer, shape.vision.select_feature
    if shape.vision.scales:
        config.model.s2 = ",".join(map(str, shape.vision.scales))
    record_pictures(config, sources.neck.pictures, shape.vision.image_size)
    record_length(config, sources.neck.pictures, shape)
    if config.train.projector == "frozen" and not sources.neck.tensors and shape.projector.kind != "identity":
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


def _projector(config: Config, language: DecoderConfig, vision: TowerConfig, neck: Neck) -> ProjectorConfig:
    try:
        projector = ProjectorConfig(
            kind=projector_kind(config, vision, neck), hidden=config.model.projector_hidden
        )  # fmt: skip
        projector.tokens(vision.tokens_out)
        with torch.device("meta"):
            made = make_projector(projector, vision.feature_width, language.dim)
    except ValueError as error:
        raise UsageError(str(error), where="--model.projector") from error
    if neck.tensors:  # now, and not when the base is loaded
        found = {name: tuple(tensor.shape) for name, tensor in neck.tensors.items()}
        check_shapes(
            neck.source, found, shapes_of(made),
            do=f"it takes the tower's {vision.feature_width} channels and gives the language model's {language.dim}: "
            "name the two that it was trained with",
        )  # fmt: skip
    return projector


def projector_kind(config: Config, vision: TowerConfig, neck: Neck) -> str:
    """The flag, else what weights or a VLM checkpoint say, else LaVIN's for class tokens and LLaVA's for patches."""
    if config.model.projector != "auto":
        return config.model.projector
    if neck.projector != "auto":
        return neck.projector
    return "lavin" if vision.select_feature == "class_tokens" else DEFAULT_PROJECTOR


def router_temperature(config: Config, language: DecoderConfig) -> float:
    """The flag where it is given, else what LaVIN's adapter file says it was trained with, else LaVIN's choice for a
    model of this size. It is in none of the tensors."""
    if config.adapter.temperature is not None:
        return config.adapter.temperature
    file = Path(config.adapter.init)
    said = read_lavin_args(file).get("temperature") if config.adapter.init and file.is_file() else None
    if isinstance(said, int | float):
        return float(said)
    return 5.0 if language.dim >= LLAMA_13B.dim else 10.0


def lora_config(config: Config, language: DecoderConfig) -> LoRAConfig:
    """The language model's: the flags where they are given, else what the LoRA folder of --adapter.init was trained
    with, else our defaults.

    Raises:
        UsageError: a target is no linear of this language model's blocks.
    """
    if config.train.language != "lora":
        return LoRAConfig()
    folder = Path(config.adapter.init)
    with_tower = config.train.vision == "lora"
    said = read_peft(folder, language, with_tower=with_tower)[1] if is_lora_folder(folder) else LoRAConfig()
    targets = _our_names(config.lora.targets, language) if config.lora.targets else said.targets
    return replace(_with_flags(config, said), targets=targets)


def _with_flags(config: Config, said: LoRAConfig) -> LoRAConfig:
    """`said` with what flags say instead, on all linears."""
    return LoRAConfig(
        rank=config.lora.rank or said.rank, alpha=config.lora.alpha or said.alpha, dropout=config.lora.dropout
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
