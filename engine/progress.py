"""The one line that shows how a run goes: redrawn in place on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from engine.metrics import Ema

logger = logging.getLogger("nibble")

REDRAW_SECONDS = 0.2
PLAIN_SECONDS = 10.0  # off a terminal: at most one line in this time


class Progress:
    """step/total (percent), loss, lr, tokens/s, samples/s and the time left.

    update() may be called after every step, with the numbers that are at hand (a value stays until the next one); it
    never waits for the device. Elsewhere than on a terminal the first and the last step always have their line.
    enabled=False (ranks other than 0) prints nothing.
    """

    def __init__(
        self, total_steps: int, enabled: bool = True, *, stream: TextIO | None = None, every: float = PLAIN_SECONDS
    ) -> None:
        self.total = total_steps
        self.enabled = enabled
        self.stream = sys.stderr if stream is None else stream
        self.every = every
        self._fields: dict[str, float] = {}
        self._step_seconds = Ema(0.95)
        self._seconds_a_step = 0.0
        self._last: tuple[int, float] | None = None
        self._shown = -float("inf")
        self._rich: RichProgress | None = None
        self._task = TaskID(0)
        if enabled and self.stream.isatty():
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                console=Console(file=self.stream),
                auto_refresh=False,
                transient=True,
            )
            self._rich.start()
            self._task = self._rich.add_task("", total=total_steps, line="")

    def update(self, step: int, **fields: float) -> None:
        """`step` steps are done. fields: loss (the moving average), lr, tok_s, samples_s."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            self._seconds_a_step = self._step_seconds.update((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        self._fields.update(fields)
        wait = self.every if self._rich is None else REDRAW_SECONDS
        if now - self._shown < wait and step < self.total:
            return
        self._shown = now
        if self._rich is None:
            print(f"{self._head(step)}  {self._tail(step)}", file=self.stream, flush=True)
        else:
            self._rich.update(self._task, completed=step, description=self._head(step), line=self._tail(step))
            self._rich.refresh()

    def note(self, text: str) -> None:
        """A line of its own that stays (in the log too), such as a saved checkpoint or an evaluation's score."""
        if not self.enabled:
            return
        logger.info("%s", text)
        if self._rich is None:
            print(text, file=self.stream, flush=True)
        else:
            self._rich.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Take the line off the terminal."""
        if self._rich is not None:
            self._rich.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _head(self, step: int) -> str:
        return f"step {step:,}/{self.total:,} ({100 * step / max(self.total, 1):.1f}%)"

    def _tail(self, step: int) -> str:
        parts = []
        for name, form in (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("tok_s", "{:,.0f} tok/s"),
                           ("samples_s", "{:,.1f} samples/s")):  # fmt: skip
            if name in self._fields:
                parts.append(form.format(self._fields[name]))
        if self._seconds_a_step and step < self.total:
            parts.append(f"{duration((self.total - step) * self._seconds_a_step)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """42 s, 3:05 min, 12:03:05 h."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"
