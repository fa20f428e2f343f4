"""The line that shows how loading weights goes: redrawn in place on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from engine.progress import REDRAW_SECONDS, duration

PLAIN_SECONDS = 5.0  # off a terminal: at most one line in this time, and none where all is over sooner


class LoadProgress:
    """`doing`: bytes of all (percent), bytes/s, the time left. `doing` says what goes on, such as "reading the cache".

    advance() may be called after every tensor. What took longer than PLAIN_SECONDS leaves one line that says how long.
    enabled=False (ranks other than 0) prints nothing.
    """

    def __init__(self, total: int, doing: str, enabled: bool = True, *, stream: TextIO | None = None) -> None:
        self.total = total
        self.doing = doing
        self.enabled = enabled
        self.stream = sys.stderr if stream is None else stream
        self.done = 0
        self._started = self._shown = time.monotonic()
        self._rich: RichProgress | None = None
        self._task = TaskID(0)
        if enabled and self.stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20))
            self._rich = RichProgress(
                *columns, console=Console(file=self.stream), auto_refresh=False, transient=True
            )  # fmt: skip
            self._rich.start()
            self._task = self._rich.add_task(self._text(self._started), total=total)

    def advance(self, nbytes: int) -> None:
        """So many bytes more are read and placed."""
        self.done += nbytes
        now = time.monotonic()
        if not self.enabled or now - self._shown < (PLAIN_SECONDS if self._rich is None else REDRAW_SECONDS):
            return
        self._shown = now
        if self._rich is None:
            print(self._text(now), file=self.stream, flush=True)
        else:
            self._rich.update(self._task, completed=self.done, description=self._text(now))
            self._rich.refresh()

    def close(self) -> None:
        """Take the line off the terminal."""
        if self._rich is not None:
            self._rich.stop()

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.close()
        seconds = time.monotonic() - self._started
        if kind is None and self.enabled and seconds >= PLAIN_SECONDS:
            print(f"{self.doing}: {_size(self.done)} in {duration(seconds)}", file=self.stream, flush=True)

    def _text(self, now: float) -> str:
        text = f"{self.doing}: {_size(self.done)} of {_size(self.total)} ({100 * self.done / max(self.total, 1):.0f}%)"
        rate = self.done / max(now - self._started, 1e-9)
        if not rate:
            return text
        return f"{text}, {_size(int(rate))}/s, {duration(max(self.total - self.done, 0) / rate)} left"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
