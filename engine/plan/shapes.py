"""Which model a command speaks about, where its weights may not be here: from what is in the folders, else from their
names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.architecture import vlm_config
from engine.config import Config
from engine.errors import UsageError
from engine.neck import Neck, pictures_of
from engine.pictures import record_length, record_pictures
from engine.sources import base_paths
from engine.tower_choice import seen_at_scales, selected
from models.language.config import DecoderConfig
from models.language.llama import LLAMA2_7B, LLAMA2_13B, LLAMA3_8B, LLAMA_7B, LLAMA_13B
from models.language.phi import PHI_1_5, PHI_2
from models.language.phi3 import PHI3_MINI
from models.language.stablelm import STABLELM_2_1_6B
from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336
from models.vision.eva import EVA02_CLIP_L_336
from models.vision.siglip import SIGLIP_SO400M_384
from models.vision.tower import TowerConfig
from models.vlm import VLMConfig
from models.weights.checkpoint import open_checkpoint
from models.weights.families.registry import family_of
from models.weights.parts import language_settings
from models.weights.settings import read_settings
from models.weights.towers import open_vision
from models.weights.vlm_settings import VLMSettings, is_vlm, vlm_settings

LANGUAGES: dict[str, DecoderConfig] = {
    "7B": LLAMA_7B, "13B": LLAMA_13B, "vicuna_7B": LLAMA_7B, "vicuna_13B": LLAMA_13B,
    "vicuna-7b-v1.5": LLAMA2_7B, "vicuna-13b-v1.5": LLAMA2_13B, "Llama-2-7b-hf": LLAMA2_7B,
    "Llama-2-13b-hf": LLAMA2_13B,
    "Meta-Llama-3-8B": LLAMA3_8B, "Meta-Llama-3-8B-Instruct": LLAMA3_8B, "llama3-8b-instruct": LLAMA3_8B,
    "phi-1_5": PHI_1_5, "phi-2": PHI_2, "Phi-3-mini-4k-instruct": PHI3_MINI, "stablelm-2-1_6b": STABLELM_2_1_6B,
}  # fmt: skip
TOWERS: dict[str, TowerConfig] = {
    "ViT-L-14.pt": CLIP_L_14_224, "clip-vit-large-patch14": CLIP_L_14_224,
    "clip-vit-large-patch14-336": CLIP_L_14_336, "EVA02_CLIP_L_336_psz14_s6B.pt": EVA02_CLIP_L_336,
    "siglip-so400m-patch14-384": SIGLIP_SO400M_384,
}  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model, and how it was found."""

    model: VLMConfig
    config: Config  # with what a checkpoint's settings say of pictures
    name: str
    weight_bytes: int | None  # of files that are here; None where any is missing


@dataclass(frozen=True, slots=True)
class _Language:
    config: DecoderConfig
    name: str
    files: tuple[Path, ...] = ()  # none: no weights are here
    settings: VLMSettings | None = None
    tower: TowerConfig | None = None  # in the same files


def shapes(config: Config) -> Shapes:
    """The model of a command. A folder without weights counts by its config.json; one that is absent has the published
    shape that goes by its name, and so does a tower; where none is named it is ViT-L/14.

    Raises:
        UsageError: the folder, or the tower, is absent, and its name is no published one.
        WeightsError: what is there is wrong.
    """
    folder, path = base_paths(config)
    language = _language(folder)
    settings, config = language.settings, copy.deepcopy(config)
    neck = Neck(pictures=pictures_of(settings), projector=config.model.projector)
    if neck.projector == "auto" and settings is not None:
        neck = replace(neck, projector=settings.projector or "auto")
    if language.tower is not None and not config.model.vision:
        vision, files = language.tower, tuple[Path, ...]()
    else:
        if settings is not None and settings.tower and not config.model.vision:
            path = Path(settings.tower)
        vision, files = _tower(path)
        vision = selected(config, vision, settings, neck.projector)
    vision = seen_at_scales(config, vision, settings)
    record_pictures(config, neck.pictures, vision.image_size)
    model = vlm_config(config, language.config, vision, neck)
    record_length(config, neck.pictures, model)
    return Shapes(model, config, language.name, _bytes((*language.files, *files)) if language.files else None)


def _language(folder: Path) -> _Language:
    if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        checkpoint = open_checkpoint(folder)
        if checkpoint.language is not None:
            found, tower = checkpoint.language, checkpoint.vision
            files = tuple(dict.fromkeys((*found.files, *(tower.files if tower is not None else ()))))
            return _Language(
                found.config, str(folder), files, checkpoint.settings, None if tower is None else tower.config
            )
    if (folder / "config.json").is_file():
        settings = read_settings(folder / "config.json")
        language = language_settings(settings)
        family = family_of(language)
        return _Language(
            family.config_of(language.with_defaults(family.defaults)), f"{folder} (its config.json; no weights)",
            settings=vlm_settings(settings, settings.text("mm_projector_type")) if is_vlm(settings) else None,
        )  # fmt: skip
    if folder.name in LANGUAGES:
        return _Language(LANGUAGES[folder.name], f"{folder.name} (published shape; no weights at {folder})")
    raise UsageError(
        f"no weights at {folder}, and {folder.name!r} is no published size", where="--model.language",
        do=f"name a folder with weights or a config.json, or one called {', '.join(LANGUAGES)}",
    )  # fmt: skip


def _tower(path: Path | None) -> tuple[TowerConfig, tuple[Path, ...]]:
    """A tower's shape and files, none where they are not here."""
    if path is None:
        return CLIP_L_14_224, ()
    if path.exists():
        tower = open_vision(path)
        try:
            return tower.config, tuple(tower.files)
        finally:
            tower.close()
    if (name := path.name.partition("@")[0]) in TOWERS:  # a Hub id may end in a revision
        return TOWERS[name], ()
    raise UsageError(
        f"no tower at {path}, and {name!r} is no published one", where="--model.vision",
        do=f"name a tower's folder or file, or one called {', '.join(TOWERS)}",
    )  # fmt: skip


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
