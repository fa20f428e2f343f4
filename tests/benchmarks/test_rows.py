"""A row is complete or refused; of several runs the latest counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.rows import Recorder, latest, parse, read, run_name
from tests.benchmarks.made_up_rows import ORIGIN, row


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [row(), row(variant="liger", package="liger-kernel 0.8.5"), row(mode=None, failure="ImportError: no apex")]
    recorder = Recorder(tmp_path / "results", ORIGIN.run)
    for one in rows:
        recorder.add(one)
    assert recorder.path.name == f"{ORIGIN.run}.jsonl"
    assert read(tmp_path / "results") == rows


def test_rows_are_appended(tmp_path: Path) -> None:
    Recorder(tmp_path, "run").add(row())
    before = (tmp_path / "run.jsonl").read_text()
    Recorder(tmp_path, "run").add(row(variant="torch"))
    after = (tmp_path / "run.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bench": ""}, "bench got ''"),
        ({"case": {}}, "case got"),
        ({"mode": "sideways"}, "mode got 'sideways'"),
        ({"mode": None}, "a time and a mode"),
        ({"ms": None}, "a time and a mode"),
        ({"failure": "and a time"}, "a time and a mode"),
        ({"ms": -1.0}, "ms got -1.0"),
        ({"ms": float("nan")}, "ms got nan"),
        ({"ms": "fast"}, "ms got 'fast'"),
        ({"launches": True}, "launches got True"),
        ({"waits": 1}, "waits got 1"),
        ({"dirty": None}, "dirty got None"),
        ({"copy_gbps": None}, "copy_gbps got None"),
        ({"flops": 1}, "against bytes or against flops"),
        ({"surprise": 1}, "unknown ['surprise']"),
    ],
)
def test_what_is_no_row_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(row().flat() | change)


def test_a_missing_field_is_named() -> None:
    values = row().flat()
    del values["driver"]
    with pytest.raises(ValueError, match=r"missing \['driver'\]"):
        parse(values)


@pytest.mark.parametrize("line", ['{"bench": "rope"}', "no json"])
def test_a_bad_line_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.jsonl").write_text(json.dumps(row().flat()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: "):
        read(tmp_path)


def test_the_latest_run_of_a_card_and_benchmark_counts() -> None:
    older = [row(ms=1.0), row(ms=1.0, variant="torch"), row(bench="swiglu", ms=1.0)]
    newer = [row(ms=2.0, run="newer", date="2000-01-02T00:00:00+00:00")]
    other = [row(ms=3.0, run="other", gpu="Another", date="2000-01-03T00:00:00+00:00")]
    assert {(r.bench, r.variant, r.ms, r.origin.gpu) for r in latest([*newer, *older, *other])} == {
        ("rope", "nibble", 2.0, "Made-Up H200"),
        ("swiglu", "nibble", 1.0, "Made-Up H200"),
        ("rope", "nibble", 3.0, "Another"),
    }


def test_a_run_of_some_cases_leaves_the_others_as_they_were() -> None:
    """And within a case nothing is compared across runs: the old peer is gone."""
    older = [row(ms=1.0), row(ms=1.0, variant="torch"), row(ms=1.0, case={"T": 16})]
    newer = [row(ms=2.0, run="newer", date="2000-01-02T00:00:00+00:00")]
    assert [(r.name, r.variant, r.ms) for r in latest([*older, *newer])] == [
        ("T=16", "nibble", 1.0),
        ("T=8", "nibble", 2.0),
    ]


def test_the_last_row_of_a_run_counts() -> None:
    (one,) = latest([row(ms=1.0), row(ms=2.0, date="2000-01-01T00:00:01+00:00")])
    assert one.ms == 2.0


def test_a_run_is_named_after_date_commit_and_card() -> None:
    assert run_name("2026-11-21T05:12:30+00:00", "af7e4ca", "NVIDIA H200") == "20261121-051230-af7e4ca-NVIDIA-H200"
