"""Where the embedded demo lives once it was unpacked: its base model in Meta's layout, and its problems.

Both are made on first use, whole or not at all, in $NIBBLE_CACHE (~/.cache/nibble), under a name that changes with
what they are made from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from engine.files import discard
from models.weights.whole import TEMPORARY, beside

HERE = Path(__file__).parent
BASE_WEIGHTS = HERE / "base.safetensors"
BASE_TOKENIZER = HERE / "tokenizer.model"


def cache_root() -> Path:
    """$NIBBLE_CACHE, or ~/.cache/nibble."""
    return Path(os.environ.get("NIBBLE_CACHE") or Path.home() / ".cache" / "nibble")


def quantized_weights() -> Path:
    """The folder of engine/loading/cache.py: what was quantised once, a folder for each model."""
    return cache_root() / "weights"


def demo_base() -> Path:
    """A folder with params.json, consolidated.00.pth, tokenizer.model and tower/ (a Hugging Face CLIP tower)."""
    from engine.demo.base import unpack_base

    return _made("demo-base", [BASE_WEIGHTS, BASE_TOKENIZER, HERE / "base.py"], unpack_base)


def demo_data() -> Path:
    """A folder in ScienceQA's layout with the demo's problems."""
    from engine.demo.problems import write_demo_data

    sources = sorted(HERE.glob("*.py"))
    return _made("demo-data", sources, write_demo_data)


def _made(name: str, made_from: list[Path], make: Callable[[Path], object]) -> Path:
    digest = hashlib.sha256()
    for path in made_from:
        digest.update(path.read_bytes())
    folder = cache_root() / f"{name}-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(folder, TEMPORARY)
    temporary.mkdir()
    try:
        make(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process made it meanwhile
            if not folder.is_dir():
                raise
    finally:
        if temporary.is_dir():
            discard(temporary)
    return folder
