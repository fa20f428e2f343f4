from __future__ import annotations

import io

import pytest

from engine.loading import progress as load_progress
from engine.loading.progress import LoadProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(load_progress.time, "monotonic", lambda: now[0])
    return now


def test_off_a_terminal_there_is_a_line_every_five_seconds_and_one_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    with LoadProgress(13_500_000_000, "reading and quantizing weights", stream=stream) as progress:
        for _ in range(135):
            clock[0] += 0.25
            progress.advance(100_000_000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "reading and quantizing weights: 2.00 GB of 13.50 GB (15%), 400 MB/s, 29 s left"
    assert lines[-1] == "reading and quantizing weights: 13.50 GB in 34 s"
    assert len(lines) == 7
    assert "\x1b" not in stream.getvalue()


def test_what_is_quick_says_nothing(clock: list[float]) -> None:
    stream = io.StringIO()
    with LoadProgress(1000, "reading", stream=stream) as progress:
        clock[0] += 4.0
        progress.advance(1000)
    assert stream.getvalue() == ""


def test_on_a_terminal_the_line_is_drawn_in_place(clock: list[float]) -> None:
    stream = Terminal()
    with LoadProgress(4_000_000, "reading the cache", stream=stream) as progress:
        clock[0] += 1.0
        progress.advance(1_000_000)
    assert "reading the cache: 1 MB of 4 MB (25%), 1 MB/s, 3 s left" in stream.getvalue()


def test_an_error_leaves_no_last_line_and_other_ranks_print_nothing(clock: list[float]) -> None:
    for enabled in (True, False):
        stream = io.StringIO()
        with pytest.raises(OSError), LoadProgress(100, "reading", enabled, stream=stream):
            clock[0] += 60.0
            raise OSError
        assert stream.getvalue() == ""
    stream = io.StringIO()
    with LoadProgress(100, "reading", False, stream=stream) as progress:
        clock[0] += 60.0
        progress.advance(100)
    assert stream.getvalue() == ""
