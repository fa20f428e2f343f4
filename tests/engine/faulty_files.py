"""File operations that are numbered, logged and made to fail: the fail-point shim of the checkpoint tests."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

OS_CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class _File:
    """A file whose write() is an operation of its own."""

    def __init__(self, file: Any, operation: Callable[..., None]) -> None:
        self.__dict__.update(file=file, operation=operation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.operation("write", Path(f"/proc/self/fd/{self.file.fileno()}").readlink())
        return self.file.write(data)


@contextmanager
def numbered_operations(fail: Callable[[int], None] | None = None) -> Iterator[list[tuple[str, ...]]]:
    """Yields the log, one (name, path, ...) an operation; fail(k) is called in place of ... before operation k."""
    log: list[tuple[str, ...]] = []
    real = {name: getattr(os, name) for name in OS_CALLS}
    real_open = io.open

    def operation(name: str, *paths: object) -> None:
        log.append((name, *map(str, paths)))
        if fail is not None:
            fail(len(log) - 1)

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "fsync":  # not carried out: only a power cut would tell the difference, and it is slow
                operation(name, Path(f"/proc/self/fd/{args[0]}").readlink())
                return None
            operation(name, *args[: 2 if name in ("rename", "replace") else 1])
            return real[name](*args, **kwargs)

        return call

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return real_open(file, mode, *args, **kwargs)
        operation("create", file)
        return _File(real_open(file, mode, *args, **kwargs), operation)

    patches = [mock.patch.object(os, name, wrap(name)) for name in OS_CALLS] + [
        mock.patch.object(io, "open", open_file)
    ]
    for patch in patches:
        patch.start()
    try:
        yield log
    finally:
        for patch in patches:
            patch.stop()


def exit_at(k: int) -> Callable[[int], None]:
    """The process dies at operation k: no handler, no flush."""
    return lambda number: os._exit(9) if number == k else None


def raise_at(k: int, code: int = errno.EIO) -> Callable[[int], None]:
    """Operation k fails."""

    def fail(number: int) -> None:
        if number == k:
            raise OSError(code, os.strerror(code))

    return fail
