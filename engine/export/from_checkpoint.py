"""A checkpoint of another project, opened to be written in another format: whole, a LoRA on its base, a projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from engine.errors import CheckpointError, UsageError
from engine.export.origin import LoRATensors, Origin, Stage
from engine.sources import located
from models.weights.checkpoint import Checkpoint, open_checkpoint
from models.weights.lora_settings import CONFIG_NAME as ADAPTER_CONFIG
from models.weights.settings import read_settings
from models.weights.source import VisionSource
from models.weights.towers import open_vision
from models.weights.vlm_settings import VLMSettings

STAGES: Mapping[str, Stage] = {"language": "none", "vlm": "full", "projector": "projector", "lora": "lora"}


def open_export_checkpoint(path: str, base: str, vision: str, tokenizer: str) -> Origin:
    """The checkpoint at `path` (a folder or Hub id). `base` is what a LoRA or projector was trained on, `vision` the
    tower where none is in it (and what it will be called), `tokenizer` a folder.

    Raises:
        UsageError: a LoRA or a projector without its base.
        CheckpointError: a file or folder is not there.
        WeightsError: a file is wrong.
    """
    folder = _existing(path, "--checkpoint")
    base_name = base or _said_base(folder)
    under_folder = located(Path(base_name)) if base_name else None
    under = open_checkpoint(under_folder) if under_folder is not None and under_folder.exists() else None
    if under is not None and under.language is None:
        raise CheckpointError(f"{base_name} holds no language model", where="--base", do="name the language model")
    checkpoint = open_checkpoint(
        folder, base=None if under is None or under.language is None else under.language.config
    )
    if checkpoint.language is not None:
        if base:
            raise UsageError(f"--base {base}, and {path} is no LoRA or projector", where="--base", do="leave it out")
        under = None
    language = checkpoint.language if under is None else under.language
    if language is None:
        said = f"; it says {base_name!r}, which is not here" if base_name else ""
        raise UsageError(
            f"{path} holds a {checkpoint.kind} without its language model{said}", where="--checkpoint",
            do="name what it was trained on with --base",
        )  # fmt: skip
    settings = _settings(checkpoint, under, vision)
    folders = [Path(tokenizer)] if tokenizer else []
    return Origin(
        name=path, stage=STAGES[checkpoint.kind], language=language, language_lora=_lora(checkpoint),
        vision=_tower(checkpoint, under, settings, vision),
        projector=_first(checkpoint.projector, None if under is None else under.projector) or {},
        image_newline=checkpoint.image_newline if under is None or checkpoint.image_newline is not None
        else under.image_newline,
        settings=settings, base=base_name or path,
        folders=[*folders, folder, *([] if under is None or under_folder is None else [under_folder])],
    )  # fmt: skip


def _existing(name: str, flag: str) -> Path:
    path = located(Path(name))
    if not path.exists():
        raise CheckpointError(f"{name} is not there", where=flag, do="name a folder or a Hub id")
    return path


def _said_base(folder: Path) -> str:
    """The base that a LoRA's adapter_config.json names."""
    file = folder / ADAPTER_CONFIG
    said = read_settings(file).values.get("base_model_name_or_path") if file.is_file() else None
    return said if isinstance(said, str) else ""


def _lora(checkpoint: Checkpoint) -> LoRATensors | None:
    if checkpoint.lora is None or checkpoint.lora_config is None:
        return None
    return LoRATensors(tensors=checkpoint.lora, config=checkpoint.lora_config)


def _settings(checkpoint: Checkpoint, under: Checkpoint | None, vision: str) -> VLMSettings | None:
    settings = checkpoint.settings or (None if under is None else under.settings)
    return replace(settings, tower=vision) if settings is not None and vision else settings


def _tower(
    checkpoint: Checkpoint, under: Checkpoint | None, settings: VLMSettings | None, vision: str
) -> VisionSource | None:
    """The tower in the checkpoint, else in its base, else the one that is named."""
    held = checkpoint.vision or (None if under is None else under.vision)
    if held is not None or settings is None:
        return held
    path = located(Path(settings.tower))
    if not path.exists():
        raise CheckpointError(
            f"the tower {settings.tower!r} is not here, and its weights are not in the checkpoint",
            where="--vision" if vision else "mm_vision_tower of config.json", do="name it with --vision",
        )  # fmt: skip
    return open_vision(path, select_layer=settings.select_layer, select_feature=settings.select_feature)


def _first(first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    return first if first else second
