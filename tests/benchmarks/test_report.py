"""README.md and the goals as data, from recorded rows; the rows here are made up."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.goals import GOALS
from tests.benchmarks.made_up_rows import all_fulfilling, record, row

G5, G12 = GOALS[4], GOALS[11]


def goals(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert report.main(["--json", "--folder", str(folder)]) == 0
    return {goal["id"]: goal for goal in json.loads(capsys.readouterr().out)["goals"]}


def readme(folder: Path) -> str:
    assert report.main(["--folder", str(folder)]) == 0
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_committed_report_is_what_the_rows_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_without_rows_everything_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = goals(tmp_path, capsys)
    assert list(found) == [f"G{i}" for i in range(1, 24)]
    for goal in found.values():
        assert list(goal) == ["id", "text", "target", "measured", "status", "rows"]
        assert (goal["status"], goal["measured"], goal["rows"]) == ("not_measured", None, [])
        assert goal["text"] and goal["target"]
    text = readme(tmp_path)
    assert "No rows are recorded yet: every goal stands as not measured." in text
    assert text.count("| not measured |") == 23
    assert not (tmp_path / "plots").exists()


def test_met_missed_and_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = [row("adamw", one.case, "step", variant=one.variant, ms=1.0) for one in all_fulfilling(G12)]
    record(tmp_path, [*all_fulfilling(G5), *slow])
    (tmp_path / "limits.json").write_text('{"G12": "three launches", "G5": "nothing, it is met"}')
    found = goals(tmp_path, capsys)
    assert {found[goal]["status"] for goal in ("G5",)} == {"met"}
    assert (found["G12"]["status"], found["G6"]["status"]) == ("missed", "not_measured")
    assert str(found["G12"]["measured"]).startswith("microseconds 1e+03 (model=LaVIN-")
    rows = found["G12"]["rows"]
    assert isinstance(rows, list) and rows[0]["bench"] == "adamw" and rows[0]["gpu"] == "Made-Up H200"
    text = readme(tmp_path)
    assert "Judged on Made-Up H200." in text
    assert "Limit: three launches |" in text and "it is met" not in text


def test_the_latest_run_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = {"run": "20000102", "date": "2000-01-02T00:00:00+00:00"}
    slow = [row("adamw", one.case, "step", variant=one.variant, ms=1.0, **again) for one in all_fulfilling(G12)]
    record(tmp_path, [*slow, *all_fulfilling(G12)])
    assert goals(tmp_path, capsys)["G12"]["status"] == "missed"


def test_cards_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = [one for one in all_fulfilling(G12) if one.variant != "nibble"]
    later = {"gpu": "Another card", "run": "20000102", "date": "2000-01-02T00:00:00+00:00"}
    ours = [row("adamw", one.case, "step", ms=1e-3, **later) for one in all_fulfilling(G12) if one.variant == "nibble"]
    record(tmp_path, [*peers, *ours])
    assert goals(tmp_path, capsys)["G12"]["status"] == "not_measured"
    text = readme(tmp_path)
    assert "## Another card" in text and "## Made-Up H200" in text and "Judged on Made-Up H200." in text


def test_the_newest_card_stands_in_for_the_one_the_goals_are_set_for(tmp_path: Path) -> None:
    old = {"gpu": "Old card", "run": "a", "date": "2000-01-01T00:00:00+00:00"}
    new = {"gpu": "New card", "run": "b", "date": "2000-01-02T00:00:00+00:00"}
    record(tmp_path, [row(**new), row(**old)])
    assert "Judged on New card." in readme(tmp_path)


def test_a_table_shows_who_was_measured_and_who_was_not(tmp_path: Path) -> None:
    record(
        tmp_path,
        [
            row(ms=0.5, fraction=0.75, extra_bytes=2_000_000, launches=3),
            row(variant="torch", ms=2.0, timing="stream"),
            row(mode=None, variant="apex", package="apex", failure="ModuleNotFoundError: No module named 'apex'"),
        ],
    )
    text = readme(tmp_path)
    assert "| forward, ms | nibble | torch | our extra MB | our launches | our host us |" in text
    assert "| T=8 | 0.5 [0.9, 1.1] 75% | 2 [0.9, 1.1] 50% (stream) | 2.0 | 3 | 10 |" in text
    assert "* apex: ModuleNotFoundError: No module named 'apex' (1 cases)" in text
    assert "2000-01-01, commit test; driver 0, torch 0, triton 0, Python 0; copy 1000 GB/s" in text


def test_plots_are_written_and_removed(tmp_path: Path) -> None:
    record(tmp_path, [row(), row(variant="torch & co", fraction=1.2)])
    assert "(plots/Made-Up-H200-rope.svg)" in readme(tmp_path)
    plot = tmp_path / "plots" / "Made-Up-H200-rope.svg"
    texts = [node.text for node in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert {"nibble", "torch & co", "50%", "120%", "forward, T=8"} <= set(texts)
    (tmp_path / "results" / f"{row().origin.run}.jsonl").unlink()
    assert "plots/" not in readme(tmp_path).split("## Goals")[1] and not plot.exists()


def test_a_stale_report_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, [row()])
    readme(tmp_path)
    assert report.main(["--check", "--folder", str(tmp_path)]) == 0
    record(tmp_path, [row(variant="torch")])
    assert report.main(["--check", "--folder", str(tmp_path)]) == 1
    assert "README.md is not what the rows give" in capsys.readouterr().err


def test_a_bad_row_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.jsonl").write_text("{}\n")
    assert report.main(["--json", "--folder", str(tmp_path)]) == 1
    assert "run.jsonl, line 1: missing" in capsys.readouterr().err
