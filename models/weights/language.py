"""The language model's weights, whichever layout they come in."""

from __future__ import annotations

from pathlib import Path

from models.weights.errors import WeightsError
from models.weights.hf_llama import open_hf
from models.weights.meta import open_meta
from models.weights.source import LanguageSource
from models.weights.vicuna import open_vicuna

__all__ = ["LanguageSource", "open_language"]


def open_language(folder: str | Path, delta: str | Path = "", *, legacy_permutation: bool = False) -> LanguageSource:
    """LLaMA or merged Vicuna from `folder`: Meta's layout if it holds params.json, else Hugging Face's (config.json).

    `delta` names a Vicuna delta to add; `legacy_permutation` adds it as LaVIN did, see `open_vicuna`.

    Raises:
        WeightsError: neither layout is there, or a file is wrong.
    """
    folder = Path(folder)
    if (folder / "params.json").exists():
        source = open_meta(folder)
    elif (folder / "config.json").exists():
        source = open_hf(folder)
    else:
        raise WeightsError(
            folder, "holds neither params.json (Meta's layout) nor config.json (Hugging Face's)",
            do="name the folder itself, such as weights/7B",
        )  # fmt: skip
    return open_vicuna(source, Path(delta), legacy_permutation=legacy_permutation) if delta else source
