"""A folder that is whole or absent: written under a hidden name beside its place, synced, renamed.

The hidden folder is locked while it is written. One that nobody holds is what a killed export of the same folder left:
the next one removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.errors import CheckpointError, UsageError
from models.weights.whole import TEMPORARY, beside, sync

SMALL = 64 << 20  # bytes for the files beside the weights


@contextmanager
def new_folder(output: Path, size: int) -> Iterator[Path]:
    """Gives a temporary folder to write `size` bytes of weights into; it becomes `output` when all went well.

    Raises:
        UsageError: `output` is there and is not an empty folder.
        CheckpointError: the disk has no room, or an error while writing. Nothing is left behind then.
    """
    require_new(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        _require_room(output.parent, size + SMALL)
        temporary = beside(output, TEMPORARY)
        temporary.mkdir()
        lock = _locked(temporary)
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):  # shards are already
            sync(path)
        temporary.replace(output)  # takes the place of an empty folder
        sync(output.parent)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def require_new(output: Path) -> None:
    """Checks that nothing would be lost."""
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise UsageError(
            f"{output} is there already", where="--output", why="an export never writes over anything",
            do="name a new folder, or remove that one",
        )  # fmt: skip


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A settings file, as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_leftovers(output: Path) -> None:
    name = re.compile(re.escape(f"{TEMPORARY}{output.name}-") + "[0-9a-f]{12}")
    for folder in output.parent.iterdir():
        if name.fullmatch(folder.name) and (lock := _locked(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle that locks `folder` until it is closed or its process ends; None where another one has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks never says that a folder is nobody's
        os.close(handle)
        return None
    return handle


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"the export needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free", where=str(folder),
            do="free some space, or give --output on another disk",
        )  # fmt: skip


def _cannot_write(output: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {output}: {error.strerror or error}", where=str(error.filename or output),
        why="nothing was left behind", do="make room or the folder writable, and export again",
    )  # fmt: skip
