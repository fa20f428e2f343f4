"""Writes a file so that it is whole or absent, and durable: what a rename or a power cut may not undo."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # how names begin of what is being written


def beside(path: Path, prefix: str) -> Path:
    """A fresh hidden name next to `path`, on the same file system, so that a rename to or from it is atomic."""
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:12]}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write it to. At the end it is synced and renamed; after an error nothing is left."""
    temporary = beside(path, TEMPORARY)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or the names inside a folder, durable: without it a rename may be forgotten in a power
    cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
