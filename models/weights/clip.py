"""CLIP's vision tower: where to find one, and which layout it has.

Only what the tower runs is read: the text model, the tower's last norm and the projections are known and left out.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from models.weights.archive import Reopened, check_file, is_torchscript, open_archive
from models.weights.clip_hf import open_hf_tower
from models.weights.clip_openai import open_openai, open_program
from models.weights.errors import WeightsError
from models.weights.hf_files import tensor_files
from models.weights.source import VisionSource

__all__ = ["VisionSource", "find_vision", "open_vision"]

OPENAI_NAME = "ViT-L-14.pt"
HF_NAME = "clip-vit-large-patch14"


def open_vision(path: str | Path) -> VisionSource:
    """A CLIP vision tower from OpenAI's ViT-L-14.pt, a file of tensors (.pt, .pth, .safetensors) or a Hugging Face
    folder. A file with Hugging Face's names needs its config.json beside it.

    Raises:
        WeightsError: the file is damaged, a program that is not OpenAI's own archive, of another architecture, or its
            tensors are missing, unknown or of another shape (all listed).
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return open_hf_tower(path, tensor_files(path))
        if (path / OPENAI_NAME).exists():
            return open_vision(path / OPENAI_NAME)
        raise WeightsError(path, f"holds neither config.json (Hugging Face's layout) nor {OPENAI_NAME}")
    check_file(path)
    file = Reopened(partial(open_program if is_torchscript(path) else open_archive, path))
    if any(name.startswith("visual.") for name in file().shapes):
        return open_openai(file)
    if (path.parent / "config.json").exists():
        return open_hf_tower(path.parent, [path])
    raise WeightsError(
        path, "has no tensors with OpenAI's names (visual.*), and no config.json beside it",
        do=f"name OpenAI's {OPENAI_NAME} or a Hugging Face folder",
    )  # fmt: skip


def find_vision(*folders: str | Path) -> Path | None:
    """A ViT-L/14 in `folders` (OpenAI's file, then Hugging Face's folder), in the cache of OpenAI's package, or in
    Hugging Face's cache; None where there is none. Nothing is downloaded."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    snapshots = sorted((hub / f"models--openai--{HF_NAME}" / "snapshots").glob("*"))
    beside = [Path(folder) / name for folder in folders for name in (OPENAI_NAME, HF_NAME)]
    for path in (*beside, Path.home() / ".cache" / "clip" / OPENAI_NAME, *snapshots):
        if path.is_file() or (path / "config.json").exists():
            return path
    return None
