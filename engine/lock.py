"""One writer per run directory: a lock file that names its holder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from engine.errors import EnvironmentProblem, UsageError

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, so exactly that a later one with the same number is told apart."""

    pid: int
    host: str
    boot_id: str  # changes when the machine restarts
    started: int  # clock ticks after boot
    since: str  # for people

    @classmethod
    def myself(cls) -> Holder:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(os.getpid(), socket.gethostname(), _boot_id(), _started(os.getpid()) or 0, now)

    def is_elsewhere(self) -> bool:
        """Whether it ran on another host (or in another container): nothing can be said about it from here."""
        return self.host != socket.gethostname()

    def is_alive(self) -> bool:
        """Whether that very process still runs on this host."""
        return self.boot_id == _boot_id() and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Held from acquire() to release(). A holder that is gone is named in the log and replaced.

    The file stays when the lock is released, empty: removing it would let two newcomers lock two different files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def acquire(self) -> None:
        """
        Raises:
            UsageError: another process holds the lock, or one on another host may.
            EnvironmentProblem: the file system has no file locks.
        """
        with self._exclusive() as file:
            holder = _parse(file.read())
            if holder is not None and (holder.is_elsewhere() or holder.is_alive()):
                self._refuse(holder)
            if holder is not None:
                logger.warning("took over %s: its %s has ended without releasing it", self.path, holder)
            _replace(file, json.dumps(asdict(Holder.myself())))

    def release(self) -> None:
        """Only by its holder; anybody else's lock is left alone."""
        with self._exclusive() as file:
            holder = _parse(file.read())
            if holder is not None and holder.pid == os.getpid() and not holder.is_elsewhere():
                _replace(file, "")

    def _exclusive(self) -> IO[str]:
        """The file, under a kernel lock that lasts until it is closed: two processes never examine it at once."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            raise EnvironmentProblem(
                f"cannot lock {self.path}: {error.strerror}",
                why="this file system has no file locks, and two runs must not write to one directory",
                do="give --output_dir on a local disk",
            ) from error
        file.seek(0)
        return file

    def _refuse(self, holder: Holder) -> None:
        elsewhere = holder.is_elsewhere()
        why = "whether it still runs cannot be seen from here" if elsewhere else "two runs would mix their files"
        do = f"wait for it or stop it (kill -TERM {holder.pid} saves first), or give another --output_dir"
        if elsewhere:
            do = f"if it has ended, delete {self.path}; otherwise give another --output_dir"
        raise UsageError(f"run directory in use by {holder}", where=str(self.path.parent), why=why, do=do)


def _parse(text: str) -> Holder | None:
    """The holder, or None for an empty file or one that a crash left half-written."""
    try:
        fields: Any = json.loads(text)
        return Holder(**fields)
    except (ValueError, TypeError):
        return None


def _replace(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _started(pid: int) -> int | None:
    """When the process started, in ticks after boot; None where there is none, or only its unreaped remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold spaces; after it: state, ppid, ...
    return None if fields[0] in "ZX" else int(fields[19])
