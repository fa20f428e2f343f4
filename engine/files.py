"""A run's files: replaced as a whole, checkpoints by their numbers, safe removal, the free-disk check."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from engine.errors import CheckpointError
from models.weights.whole import TEMPORARY, beside, whole

logger = logging.getLogger("nibble")

DELETED = ".del-"  # no longer part of the run; not yet gone from the disk
_STEP = re.compile(r"(\.old-)?step-(\d{1,18})")  # .old-: the earlier save of a step that is being saved again


def is_dir(path: Path) -> bool:
    """Whether a directory is there; False also where the system does not let us look (Path.is_dir raises then)."""
    try:
        return path.is_dir()
    except OSError:
        return False


def step_number(path: Path) -> int | None:
    """The N of a checkpoint directory step-N (or .old-step-N); None for anything else."""
    match = _STEP.fullmatch(path.name)
    return int(match[2]) if match and path.is_dir() else None


def step_dirs(directory: Path) -> list[tuple[int, Path]]:
    """(N, path) of the checkpoint directories, oldest first. Whether they are whole is engine.checkpoint's affair."""
    found = [(n, p) for p in directory.iterdir() if (n := step_number(p)) is not None]
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))  # ".old-step-3" sorts before "step-3"


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file. A reader, also one after a crash, sees the old text or the new one."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def discard(path: Path) -> None:
    """Remove a directory: renamed first, so that nobody ever finds half of it under its own name.

    A file system that refuses is reported in the log and does not end the run: sweep() tries again at the next start.
    """
    doomed = path if path.name.startswith(DELETED) else beside(path, DELETED)
    try:
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error.strerror)


def sweep(directory: Path) -> list[str]:
    """Remove what a killed process left behind (.tmp-*, .del-*). Returns the names, for the log."""
    names = sorted(p.name for p in directory.iterdir() if p.name.startswith((TEMPORARY, DELETED)))
    for name in names:
        leftover = directory / name
        if leftover.is_dir():
            discard(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return names


def require_free(directory: Path, needed: int, what: str) -> None:
    """Check that `needed` bytes are free where `directory` is.

    Raises:
        CheckpointError: they are not. Nothing was written or removed.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{what} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            where=str(directory),
            why="a full disk in the middle of a save would leave no new checkpoint; the older ones were not touched",
            do="free some space, or give --output_dir on another disk, then --resume auto",
        )
