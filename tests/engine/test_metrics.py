from __future__ import annotations

import csv
import json
import sys

import pytest

from engine.errors import EnvironmentProblem
from engine.metrics import COLUMNS, Ema, Metrics, read_metrics, series


def write_steps(folder, steps, **options):
    metrics = Metrics(folder, **options)
    for step in steps:
        metrics.write(step, loss=1.0 / step, lr=1e-3)
    metrics.close()


def csv_rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_go_to_both_files(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(10, loss=0.1 + 0.2, lr=1e-3)
    metrics.write(10, eval_loss=2.5)
    rows = read_metrics(tmp_path / "metrics.jsonl")  # before close: a reader sees every line at once
    metrics.close()
    assert rows == [{"step": 10, "loss": 0.1 + 0.2, "lr": 1e-3}, {"step": 10, "eval_loss": 2.5}]
    first, second = csv_rows(tmp_path)
    assert tuple(first) == COLUMNS
    assert (first["step"], float(first["loss"]), first["eval_loss"]) == ("10", 0.1 + 0.2, "")
    assert (second["loss"], second["eval_loss"]) == ("", "2.5")
    assert series(rows, "loss") == [(10, 0.1 + 0.2)]


def test_a_resumed_run_reads_as_one(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    write_steps(whole, range(1, 9))
    write_steps(resumed, range(1, 7))  # killed after step 6; its checkpoint is of step 4
    write_steps(resumed, range(5, 9), resume_step=4)
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (resumed / name).read_text() == (whole / name).read_text()


def test_a_torn_last_line_is_named_and_left_out(tmp_path, caplog):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    write_steps(tmp_path, [4], resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 4]
    assert [row["step"] for row in csv_rows(tmp_path)] == ["1", "2", "4"]
    assert "line 3" in caplog.text


def test_a_new_run_begins_with_empty_files(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, [1])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(csv_rows(tmp_path)) == 1


def test_a_number_that_is_not_finite_is_null_and_the_line_is_json(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, loss=float("nan"), grad_norm=float("inf"))
    metrics.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "grad_norm": None}
    assert series([row], "loss") == []


def test_an_unknown_metric_is_refused(tmp_path):
    metrics = Metrics(tmp_path)
    with pytest.raises(ValueError, match=r"unknown metric los; accepted: step, epoch"):
        metrics.write(1, los=1.0)
    metrics.close()


def test_tensorboard_absent_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentProblem, match=r"\[log\]"):
        Metrics(tmp_path, tensorboard=True)


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    write_steps(tmp_path, range(1, 4), tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_the_average_is_unbiased_and_continues_from_its_state():
    ema = Ema(0.9)
    assert ema.update(4.0) == pytest.approx(4.0)
    assert ema.update(2.0) == pytest.approx((0.9 * 4.0 + 2.0) / 1.9)
    copy = Ema(0.9)
    copy.load(json.loads(json.dumps(ema.state())))
    assert [copy.update(x) for x in (1.0, 0.3)] == [ema.update(x) for x in (1.0, 0.3)]
