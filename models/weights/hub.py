"""Names of models on the Hugging Face hub (`org/name`), resolved to folders: the cache first, then a download."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.weights.errors import WeightsError
from models.weights.hf_files import tensor_files

NAME = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
NOT_WANTED = re.compile(r"^(consolidated|training_args|optimizer|scheduler|rng_state)|\.(fp16|fp32)\.")
BESIDE = ("mm_projector.bin", "non_lora_trainables.bin")  # pickles of LLaVA's, whatever the other weights are
SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]  # configuration, tokenizer, index of shards

# Revisions with a name, for files that are not those of today: Imp's SigLIP, which its checkpoints mean when they name
# their tower (vlm_settings.py), and phi-2 with Microsoft's tensor names. README.md has both.
REVISIONS = {
    ("google/siglip-so400m-patch14-384", "imp"): "7067f6db2baa594bab7c6d965fe488c7ac62f1c8",
    ("microsoft/phi-2", "phi-msft"): "d3186761bf5c4409f7679359284066c25ab668ee",
}


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The local path of `name`: itself where it exists, else the snapshot of a hub repository, from the cache or,
    unless HF_HUB_OFFLINE is set, downloaded (weights once, safetensors where there are any).

    Args:
        name: a path, `org/name` or `org/name@revision`.
        revision: a commit, a branch, a tag, or a name in `REVISIONS`; None: main.

    Raises:
        WeightsError: there is no such path, and no such repository in the cache or on the hub; or huggingface_hub is
            needed and not installed.
    """
    path = Path(name)
    if path.exists():
        return path
    repository, _, behind = str(name).partition("@")
    if not NAME.fullmatch(repository):
        raise WeightsError(name, "is not there, and is no name on the Hugging Face hub either (org/name)")
    wanted = revision or behind or None
    revision = REVISIONS.get((repository, wanted or ""), wanted)
    cached = find_cached(repository, revision)
    if cached is not None and _is_whole(cached):
        return cached
    if _is_offline():
        what = "is in the cache without all its weights" if cached else "is neither a path nor in the cache"
        raise WeightsError(
            name, f"{what}, and HF_HUB_OFFLINE forbids to download it",
            do=f"download it where there is a network, into {cache_folder()}, or name a folder",
        )  # fmt: skip
    return _download(repository, revision)


def cache_folder() -> Path:
    """Where huggingface_hub keeps repositories: HF_HUB_CACHE, else hub/ in HF_HOME, else in ~/.cache/huggingface."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home).expanduser() if home else cache / "huggingface") / "hub"


def find_cached(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of `org/name` in the cache, whole or not; None where there is none. Nothing is downloaded."""
    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    revision = revision or "main"
    if not COMMIT.fullmatch(revision):
        try:
            revision = (repository / "refs" / revision).read_text().strip()
        except OSError:
            return None
    snapshot = repository / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def _is_whole(snapshot: Path) -> bool:
    """Whether a snapshot has weights, and all shards where an index names some."""
    if any(snapshot.glob("*.index.json")):
        try:
            return bool(tensor_files(snapshot))
        except WeightsError:
            return False
    return any(path.suffix in WEIGHTS for path in snapshot.iterdir())


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _download(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            name, "is neither a path nor in the cache, and huggingface_hub, which downloads, is not installed",
            do="pip install '.[hub]' in nibble's folder (without nvcc: pip install huggingface_hub), or name a folder",
        ) from None  # fmt: skip
    hub: Any = huggingface_hub
    try:
        files = hub.HfApi().list_repo_files(name, revision=revision)
        weights = weights_of(files)
        if weights:
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[*SETTINGS, *weights]))
    except Exception as error:  # the errors of its HTTP libraries (requests, httpx) have no narrower base in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            name, f"could not be downloaded: {reason}", do="check the name and the network, or name a folder"
        ) from error
    raise WeightsError(
        name, "has no weights at its root, or several files that are not parts of one model",
        do="download the file that is wanted and name it",
    )  # fmt: skip


def weights_of(files: Sequence[str]) -> list[str]:
    """Of the files of a repository those with its weights, each weight once: safetensors, else .bin, else the only .pt
    or .pth. Sub-folders, other precisions (model.fp16.safetensors), a trainer's state and what is no format of
    transformers' (consolidated.safetensors) stay out."""
    root = [file for file in files if "/" not in file and not NOT_WANTED.search(file)]
    beside = [file for file in root if file in BESIDE]
    for suffix in (".safetensors", ".bin"):
        found = [file for file in root if file.endswith(suffix) and file not in BESIDE]
        if found:
            return sorted({*found, *beside})
    single = [file for file in root if file.endswith((".pt", ".pth"))]
    return beside or (single if len(single) == 1 else [])
