"""A count now and then while something long goes on, such as problems that are scored."""

from __future__ import annotations

import sys
import time

SECONDS = 5.0  # between two lines; what is over sooner says nothing


class Ticker:
    """Prints `done of total what` on stderr, at most every five seconds. Call it with the number done so far."""

    def __init__(self, total: int, what: str, *, enabled: bool = True) -> None:
        self.total = total
        self.what = what
        self.enabled = enabled
        self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.enabled and now - self._last >= SECONDS:
            self._last = now
            print(f"{done:,} of {self.total:,} {self.what}", file=sys.stderr, flush=True)
