"""Which base weights a run was trained on: recorded in checkpoints instead of the weights, checked on resume.

A file is known by its size and the sha256 of its first MiB and last 64 KiB: names, shapes and the first tensors, and in
torch's zip files also a crc32 of every tensor. Reading 13 GB to hash them all would take minutes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.weights.errors import WeightsError

HEAD = 1 << 20
TAIL = 1 << 16

FileIdentity = dict[str, str | int]


def identity(files: Sequence[Path]) -> dict[str, list[FileIdentity]]:
    """{"files": [{"path", "size" in bytes, "sha256"}, ...]} in the order given; plain JSON.

    Raises:
        WeightsError: a file cannot be read.
    """
    return {"files": [_identify(Path(path)) for path in files]}


def check_identity(recorded: Mapping[str, Sequence[Mapping[str, object]]], files: Sequence[Path]) -> None:
    """Compares `files` with what `identity` recorded. Where they lie may differ; file names, sizes and
    hashes may not.

    Raises:
        WeightsError: other files, listed as missing and extra.
    """
    old, new = (Counter(map(_text, entries)) for entries in (recorded["files"], identity(files)["files"]))
    if old != new:
        raise WeightsError(
            files[0].parent if files else "", "are not the base weights that the run was trained on",
            missing=sorted((old - new).elements()), extra=sorted((new - old).elements()),
            do="name the base weights of the run",
        )  # fmt: skip


def _text(entry: Mapping[str, object]) -> str:
    return f"{Path(str(entry['path'])).name} ({entry['size']} bytes, sha256 {entry['sha256']})"


def _identify(path: Path) -> FileIdentity:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start, length in ((0, HEAD), (max(0, size - TAIL), TAIL)):
                file.seek(start)
                digest.update(file.read(length))
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror}") from error
    return {"path": str(path.absolute()), "size": size, "sha256": digest.hexdigest()}
