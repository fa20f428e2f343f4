"""Stopping on request: a signal sets a flag, and the trainer looks at it between two steps.

Nothing is saved inside a handler: there the process may be in the middle of a step, or of a collective that the other
ranks wait for. At the step's end all ranks agree on the flag, save together and exit with 75.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 0.25  # `timeout` and some launchers deliver one request twice, within milliseconds


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGUSR1 while it is entered (from the main thread); puts the old handlers back at
    its end.

        with StopSignals() as stop:
            for batch in loader:
                ...
                if ranks.any(stop.stop_requested(), device): save and exit 75

    A second signal ends the process at once with 128 + its number. The echo of the first (within 0.25 s) is no second
    one. Forked loader workers inherit the handler and so outlive a signal sent to the whole process group: the
    step under way still needs them.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._time = 0.0
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop_requested(self) -> bool:
        """Whether a signal came in since the start."""
        return self._signal is not None

    @property
    def name(self) -> str:
        """The first signal's name, such as SIGTERM; empty while there was none."""
        return "" if self._signal is None else self._signal.name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is not None:
            if now - self._time >= ECHO_SECONDS:
                os._exit(128 + number)
            return
        self._signal = signal.Signals(number)
        self._time = now
        if os.getpid() == self._pid:
            text = f"\n{self.name}: saving after this step (once more: exit at once, unsaved)\n"
            os.write(2, text.encode())  # print() is not reentrant
