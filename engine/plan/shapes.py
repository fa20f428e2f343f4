"""Which model a command speaks about, where its weights may not be here: from what is in the folders, else from their
names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.architecture import vlm_config
from engine.config import Config
from engine.errors import UsageError
from engine.image_choices import choose_images, record_images
from engine.projector_source import with_start
from engine.sources import base_paths, open_base, start_path
from engine.tower_choice import named_tower
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
from models.weights.checkpoint import Checkpoint
from models.weights.families.registry import family_of
from models.weights.hub import find_cached
from models.weights.settings import read_settings
from models.weights.split import text_settings
from models.weights.towers import open_vision
from models.weights.vlm_settings import is_vlm, vlm_settings

LANGUAGES: dict[str, DecoderConfig] = {
    "7B": LLAMA_7B, "13B": LLAMA_13B, "vicuna_7B": LLAMA_7B, "vicuna_13B": LLAMA_13B,
    "vicuna-7b-v1.5": LLAMA2_7B, "vicuna-13b-v1.5": LLAMA2_13B, "Llama-2-7b-hf": LLAMA2_7B,
    "Llama-2-13b-hf": LLAMA2_13B,
    "Meta-Llama-3-8B": LLAMA3_8B, "Meta-Llama-3-8B-Instruct": LLAMA3_8B, "llama3-8b-instruct": LLAMA3_8B,
    "phi-1_5": PHI_1_5, "phi-2": PHI_2, "Phi-3-mini-4k-instruct": PHI3_MINI, "stablelm-2-1_6b": STABLELM_2_1_6B,
}  # fmt: skip
TOWERS: dict[str, TowerConfig] = {
    "ViT-L-14.pt": CLIP_L_14_224, "clip-vit-large-patch14": CLIP_L_14_224,
    "ViT-L-14-336px.pt": CLIP_L_14_336, "clip-vit-large-patch14-336": CLIP_L_14_336,
    "EVA02_CLIP_L_336_psz14_s6B.pt": EVA02_CLIP_L_336,
    "siglip-so400m-patch14-384": SIGLIP_SO400M_384,
}  # fmt: skip
NOTHING = Checkpoint(kind="language")  # no file of it is here
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
    checkpoint: Checkpoint  # without parts where no weights are here


def shapes(config: Config) -> Shapes:
    """The model of a command, by the rules of a run (sources.py). A folder without weights counts by its config.json;
    one that is absent has the published shape that goes by its name, and so does a tower; where none is named it is
    ViT-L/14. Of weights to start from that are absent nothing is known.

    Raises:
        CheckpointError: a checkpoint says nothing of its tower.
        UsageError: the folder, or the tower, is absent, and its name is no published one.
        WeightsError: what is there is wrong.
    """
    config = copy.deepcopy(config)
    folder, found = base_paths(config)
    language, start = _language(config, folder), start_path(config)
    checkpoint, projector = with_start(
        config, language.checkpoint, language.config, None if start is None else _here(start)
    )
    held = checkpoint.vision if not config.model.vision else None
    if held is not None:
        tower, files = held.config, tuple(held.files)
    else:
        tower, files = _tower(named_tower(config, checkpoint.settings, found)[0])
    images = choose_images(config, tower, checkpoint.settings, projector.kind, held=held is not None)
    model = vlm_config(config, language.config, images, projector)
    record_images(config, images)
    weights = () if language.checkpoint.language is None else language.checkpoint.language.files
    files = tuple(dict.fromkeys((*weights, *files, *projector.files)))
    return Shapes(model, config, language.name, bytes_of(files) if weights else None)


def _here(path: Path) -> Path | None:
    """What a path or a Hub id names where it is on this machine; else None."""
    return path if path.exists() else find_cached(str(path))


def _language(config: Config, folder: Path) -> _Language:
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if has_weights and (not config.model.delta or Path(config.model.delta).exists()):
        checkpoint = open_base(config, folder)
        assert checkpoint.language is not None
        return _Language(checkpoint.language.config, str(folder), checkpoint)
    if (folder / "config.json").is_file():
        settings = read_settings(folder / "config.json")
        language = text_settings(settings)
        family = family_of(language)
        return _Language(
            family.config_of(language.with_defaults(family.defaults)), f"{folder} (its config.json; no weights)",
            Checkpoint(kind="vlm", settings=vlm_settings(settings, settings.text("mm_projector_type")))
            if is_vlm(settings) else NOTHING,
        )  # fmt: skip
    if folder.name in LANGUAGES:
        return _Language(LANGUAGES[folder.name], f"{folder.name} (published shape; no weights at {folder})", NOTHING)
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


def bytes_of(files: Iterable[Path]) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in files)
