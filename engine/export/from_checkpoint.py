"""A checkpoint of another project, opened to be written in another format: whole, a LoRA on its base, a projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

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
NOTHING = Checkpoint(kind="language")  # the base of what needs none


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
    base_folder, trained_on = _open_base(base_name)
    checkpoint = open_checkpoint(folder, base=None if trained_on.language is None else trained_on.language.config)
    if checkpoint.language is not None:
        if base:
            raise UsageError(f"--base {base}, and {path} is no LoRA or projector", where="--base", do="leave it out")
        base_folder, trained_on = None, NOTHING
    language = checkpoint.language or trained_on.language
    if language is None:
        said = f"; it says {base_name!r}, which is not here" if base_name else ""
        raise UsageError(
            f"{path} holds a {checkpoint.kind} without its language model{said}", where="--checkpoint",
            do="name what it was trained on with --base",
        )  # fmt: skip
    settings = checkpoint.settings or trained_on.settings
    if settings is not None and vision:
        settings = replace(settings, tower=vision, tower_revision="")
    newline = checkpoint.image_newline
    return Origin(
        name=path, stage=STAGES[checkpoint.kind], language=language, language_lora=_lora(checkpoint),
        vision=checkpoint.vision or trained_on.vision or _named_tower(settings, vision),
        projector=checkpoint.projector or trained_on.projector or {},
        image_newline=trained_on.image_newline if newline is None else newline,
        settings=settings, base=base_name or path,
        folders=[*([Path(tokenizer)] if tokenizer else []), folder, *([base_folder] if base_folder else [])],
    )  # fmt: skip


def _open_base(name: str) -> tuple[Path | None, Checkpoint]:
    """-> (its folder, what it holds); nothing where it is not named, or not here.

    Raises:
        CheckpointError: it holds no language model.
    """
    folder = located(Path(name)) if name else None
    if folder is None or not folder.exists():
        return None, NOTHING
    checkpoint = open_checkpoint(folder)
    if checkpoint.language is None:
        raise CheckpointError(f"{name} holds no language model", where="--base", do="name the language model")
    return folder, checkpoint


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


def _named_tower(settings: VLMSettings | None, vision: str) -> VisionSource | None:
    """The tower that `settings` name, whose weights no checkpoint holds; None where there are no settings."""
    if settings is None:
        return None
    path = located(Path(settings.tower_source)) if settings.tower else None
    if path is None or not path.exists():
        what = f"the tower {settings.tower!r} is not here" if settings.tower else "no tower is named"
        raise CheckpointError(
            f"{what}, and its weights are not in the checkpoint",
            where="--vision" if vision else "mm_vision_tower of config.json", do="name it with --vision",
        )  # fmt: skip
    return open_vision(path, select_layer=settings.select_layer, select_feature=settings.select_feature)
