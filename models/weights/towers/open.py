"""Opens a vision tower, whichever it is: the family is read from the names of its tensors, never from a path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from models.vision.tower import SelectFeature, TowerConfig
from models.weights.archive import ZIP_MAGIC, Archive, archive_of, check_file, is_torchscript, open_archive, read_pickle
from models.weights.errors import WeightsError
from models.weights.hf_files import open_folder
from models.weights.hub import cache_folder
from models.weights.prequantized import Prequantized, check_quantization
from models.weights.settings import Settings, read_settings
from models.weights.source import VisionSource
from models.weights.towers import clip, eva, siglip
from models.weights.towers.layout import Layout, open_layout
from models.weights.towers.registry import family_named
from models.weights.towers.selection import selection
from models.weights.view import FileView, Tensors

OPENAI_NAME = "ViT-L-14.pt"
HF_NAME = "clip-vit-large-patch14"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

OPENAI = re.compile(r"visual\.(conv1\.weight|transformer\.resblocks\.0\..+)")
EVA = re.compile(r"(visual\.|model\.|)(cls_token|blocks\.0\.attn\..+)")
HF = re.compile(r"(vision_model\.|)(embeddings\.patch_embedding\.weight|encoder\.layers\.0\.layer_norm1\..+)")
HF_CLIP = re.compile(r"(vision_model\.|)(embeddings\.class_embedding|pre_layrnorm\..+)")


def open_vision(
    path: str | Path, *, select_layer: int | None = None, select_feature: SelectFeature | None = None
) -> VisionSource:
    """A vision tower: a folder of transformers (config.json and tensors), OpenAI's ViT-L-14.pt, EVA's .pt, or a file of
    tensors with the names of any of them (its config.json, where there is one, beside it).

    Args:
        select_layer: index into transformers' `hidden_states`; blocks behind it are neither read nor run.
        select_feature: which tokens leave the tower. None: the family's own, LaVIN's class tokens for CLIP; "patch"
            where a layer is given.

    Raises:
        WeightsError: the file is damaged, a program that is not OpenAI's own archive, of another architecture, or its
            tensors are missing, unknown or of another shape (all listed).
    """
    path, chosen = Path(path), selection(select_layer, select_feature)
    if (path / "config.json").exists():
        settings = read_settings(path / "config.json")
        check_quantization(settings)
        return _open(path, open_folder(path), settings, chosen)
    if path.is_dir():
        path = _only_file(path)
    tensors, beside = FileView(partial(_open_file, path)), path.parent / "config.json"
    has_settings = beside.exists() and _first(HF, tensors.shapes) is not None
    return _open(path, tensors, read_settings(beside) if has_settings else None, chosen)


def open_tower_tensors(
    where: Path, tensors: Tensors, settings: Settings | None, *,
    select_layer: int | None = None, select_feature: SelectFeature | None = None,
) -> VisionSource:  # fmt: skip
    """A vision tower from tensors under its own names: a Renamed of a checkpoint that holds one.

    Args:
        where: what errors name.
        settings: the tower's config.json or vision_config. None: the tower must be one of the published ones (CLIP,
            SigLIP) or say everything by its shapes (EVA).

    Raises:
        WeightsError: as open_vision.
    """
    return _open(where, tensors, settings, selection(select_layer, select_feature))


def _open(where: Path, in_files: Tensors, settings: Settings | None, chosen: dict[str, Any]) -> VisionSource:
    tensors = Prequantized(in_files)
    files = tensors.files if settings is None else (settings.path, *tensors.files)
    if _first(OPENAI, tensors.shapes) is not None:
        config: TowerConfig = clip.openai_config(where, tensors.shapes, **chosen)
        return open_layout(where, tensors, config, clip.OPENAI, clip.EXPORT, tensors.files)
    if (found := _first(EVA, tensors.shapes)) is not None:
        layout = replace(eva.EVA, prefix=found[1])
        config = eva.eva_config(where, tensors.shapes, layout, **chosen)
        return open_layout(where, tensors, config, layout, eva.EXPORT, tensors.files)
    if (found := _first(HF, tensors.shapes)) is None:
        raise WeightsError(
            where, "has no tensors of a vision tower that is known",
            do="name CLIP (a folder of transformers, or OpenAI's ViT-L-14.pt), SigLIP (a folder of transformers) or "
            "EVA02-CLIP (BAAI's .pt)",
        )  # fmt: skip
    if _first(HF_CLIP, tensors.shapes) is not None:
        layout = replace(clip.HF, prefix=found[1])
        config = (
            clip.published_config(where, tensors.shapes, layout, **chosen)
            if settings is None
            else clip.config_of(settings, **chosen)
        )
        return open_layout(where, tensors, config, layout, clip.EXPORT, files)
    layout = replace(siglip.HF, prefix=found[1])
    config = (
        siglip.published_config(where, tensors.shapes, layout, **chosen)
        if settings is None
        else siglip.config_of(settings, **chosen)
    )
    return open_layout(where, tensors, config, layout, siglip.EXPORT, files)


def _first(pattern: re.Pattern[str], names: Iterable[str]) -> re.Match[str] | None:
    return next((match for name in names if (match := pattern.fullmatch(name))), None)


def _only_file(folder: Path) -> Path:
    """The file of a folder that has no config.json."""
    if (folder / OPENAI_NAME).exists():
        return folder / OPENAI_NAME
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        held = f"{len(files)} files of weights" if files else "no weights"
        raise WeightsError(folder, f"holds {held} and no config.json", do="name the tower's file")
    return files[0]


def _open_file(path: Path) -> Archive:
    """The tensors of one file; a .pt may hold them under an outer key, or be OpenAI's program."""
    is_pickle = path.suffix != ".safetensors"
    is_mapped = check_file(path).startswith(ZIP_MAGIC)
    if is_pickle and is_torchscript(path):
        return clip.open_program(path)
    if not is_pickle:
        return open_archive(path)
    values = read_pickle(path)
    if isinstance(values, dict):
        values = next((values[key] for key in eva.OUTER if isinstance(values.get(key), dict)), values)
        if all(str(name).startswith("module.") for name in values):  # as saved from a wrapper of several GPUs
            values = {str(name).removeprefix("module."): value for name, value in values.items()}
    return archive_of(path, values, is_mapped=is_mapped)


def find_vision(*folders: str | Path) -> Path | None:
    """LaVIN's ViT-L/14 at 224 pixels in `folders` (OpenAI's file, then Hugging Face's folder), in the cache of OpenAI's
    package, or in Hugging Face's cache; None where there is none. Nothing is downloaded."""
    snapshots = sorted((cache_folder() / f"models--openai--{HF_NAME}" / "snapshots").glob("*"))
    beside = [Path(folder) / name for folder in folders for name in (OPENAI_NAME, HF_NAME)]
    for path in (*beside, Path.home() / ".cache" / "clip" / OPENAI_NAME, *snapshots):
        if path.is_file() or (path / "config.json").exists():
            return path
    return None


def unused_tensors(source: VisionSource) -> Iterator[tuple[str, Tensor]]:
    """What the files of `source` hold of the tower and it does not run (last blocks, last norm, pooling head), in their
    dtype, under the names of `EXPORT` in the family's file: transformers' for CLIP and SigLIP, Bunny's for EVA."""
    return source.unused()


def export_layout(config: TowerConfig) -> Layout:
    """Under which names a tower stands in checkpoints of vision-language models, behind `vision_tower.`"""
    return family_named(config.family).export
