from __future__ import annotations

import io

import pytest

from engine import progress
from engine.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_off_a_terminal_there_is_a_plain_line_now_and_then(clock):
    stream = io.StringIO()
    with Progress(1000, stream=stream, every=10.0) as bar:
        for step in range(1, 1001):
            clock[0] += 0.5
            bar.update(step, loss=2.0, lr=1.125e-3, tok_s=12345.6, samples_s=98.76)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 51  # the first, one in 10 s, the last
    assert lines[1] == ("step 21/1,000 (2.1%)  loss 2.0000  lr 1.12e-03  12,346 tok/s  98.8 samples/s  8:10 min left")
    assert lines[-1].startswith("step 1,000/1,000 (100.0%)")
    assert "left" not in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_values_stay_until_the_next_ones(clock):
    stream = io.StringIO()
    bar = Progress(10, stream=stream, every=0.0)
    bar.update(1, loss=2.5)
    bar.update(2)
    assert "loss 2.5000" in stream.getvalue().splitlines()[1]


def test_time_left_counts_from_where_a_resumed_run_starts(clock):
    stream = io.StringIO()
    bar = Progress(100, stream=stream, every=0.0)
    for step in (90, 91, 92):
        bar.update(step)
        clock[0] += 2.0
    assert stream.getvalue().splitlines()[-1].endswith("16 s left")


def test_on_a_terminal_the_line_is_drawn_in_place_and_notes_stay():
    stream = Terminal()
    with Progress(10, stream=stream) as bar:
        bar.update(10, loss=1.25)
        bar.note("saved [step-10]")
    text = stream.getvalue()
    assert "step 10/10 (100.0%)" in text
    assert "loss 1.2500" in text
    assert "saved [step-10]\n" in text  # brackets are no markup


def test_notes_off_a_terminal_and_other_ranks():
    stream = io.StringIO()
    Progress(10, stream=stream).note("saved step-10")
    assert stream.getvalue() == "saved step-10\n"
    silent = Progress(10, enabled=False, stream=Terminal())
    silent.update(1, loss=1.0)
    silent.note("x")
    silent.close()
    assert silent.stream.getvalue() == ""


def test_durations():
    assert [duration(s) for s in (0.4, 42, 185, 43385, 359_999.9)] == [
        "0 s", "42 s", "3:05 min", "12:03:05 h", "100:00:00 h",
    ]  # fmt: skip
