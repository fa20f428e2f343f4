"""What makes a checkpoint directory whole: manifest.json, the list of its files with their sizes and checksums.

    {"schema": 1, "step": 120, "files": {NAME: [bytes, crc32]}, "torch": "2.13.0", "crc32": of all the other entries}

safetensors itself loads a file with flipped bits in its tensors without a word; crc32 notices, at a few GB/s.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from engine.errors import CheckpointError
from engine.files import step_number
from engine.tensor_file import CHUNK

SCHEMA = 1
Verify = Literal["full", "size"]


def write_manifest(directory: Path, step: int, files: Mapping[str, tuple[int, int]]) -> None:
    """The last file of a checkpoint. files: {name: (bytes, crc32)}."""
    manifest: dict[str, Any] = {"schema": SCHEMA, "step": step, "files": files, "torch": str(torch.__version__)}
    manifest["crc32"] = zlib.crc32(_text(manifest))
    write_new(directory / "manifest.json", _text(manifest))


def write_new(path: Path, data: bytes) -> tuple[int, int]:
    """Write and fsync a file that is not there yet. Returns (bytes, crc32)."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data), zlib.crc32(data)


def check_manifest(path: Path, verify: Verify) -> dict[str, list[int]]:
    """The files of a checkpoint as {name: [bytes, crc32]}, after comparing them with what is on the disk.

    Raises:
        CheckpointError: as load_checkpoint().
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}", do="give a directory step-N of a run, or --resume auto")
    try:
        manifest: Any = json.loads((path / "manifest.json").read_bytes())
        if manifest.pop("crc32") != zlib.crc32(_text(manifest)):
            raise damaged(path, "manifest.json was changed after it was written")
        schema, step, files = manifest["schema"], manifest["step"], manifest["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(path, f"manifest.json is absent or unreadable ({error})") from error
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has format {schema}, this version reads {SCHEMA}", do="update nibble")
    if step_number(path) not in (step, None):
        raise damaged(path, f"its manifest is of step {step}")
    for name, (size, crc) in files.items():
        _check_file(path / name, size, crc if verify == "full" else None)
    result: dict[str, list[int]] = files
    return result


def _text(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _check_file(path: Path, size: int, crc: int | None) -> None:
    """Compare a file with its manifest entry; crc None: the size only."""
    try:
        found = path.stat().st_size
        if found != size:
            raise damaged(path.parent, f"{path.name} has {found} bytes, not {size}")
        if crc is None:
            return
        actual = 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                actual = zlib.crc32(chunk, actual)
    except OSError as error:
        raise damaged(path.parent, f"{path.name}: {error.strerror}") from error
    if actual != crc:
        raise damaged(path.parent, f"{path.name} has crc32 {actual:08x}, not {crc:08x}")


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint directory that is not what was saved."""
    return CheckpointError(
        f"checkpoint {path.name} is damaged: {reason}",
        where=str(path),
        do="--resume auto takes the newest whole one; or name an earlier step-N",
    )
