"""Out of memory in a step: exit 5, what to do about it, and nothing that was saved is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import run as runs
from engine import trainer
from engine.checkpoint import find_latest
from engine.errors import run_command
from engine.flags import parse_train

FAILS_AT, STEPS = 3, 4


def short_run(line: list[str]) -> int:
    config, notes = parse_train(line)
    return runs.train(config, ["train.py", *line], notes, max_steps=STEPS)


def test_a_run_that_runs_out_of_memory_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = ["--output_dir", str(run), "--log.save_every", "2", "--log.evaluate", "none", "--runtime.device", "cpu",
            "--dataset.num_workers", "0"]  # fmt: skip
    step = trainer.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == FAILS_AT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", failing)
    assert run_command(short_run, line) == 5
    said = capsys.readouterr().err
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 5 and "Tried to allocate 2.00 GiB" in ended["reason"]
    assert "were planned" in said and "language layers" in said and "activations, language" in said
    assert f"saved: {run / 'step-2'}" in said and "--resume auto and " in said
    assert " or --" in said.partition("do:")[2], "two things to try"
    assert "Traceback" not in said

    latest = find_latest(run)
    assert latest is not None and latest.name == "step-2", "whole"
    monkeypatch.setattr(trainer, "train_step", step)
    assert run_command(short_run, [*line, "--resume", "auto"]) == 0
    assert json.loads((run / "exit.json").read_text())["code"] == 0


def test_nothing_saved_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(trainer, "train_step", failing)
    line = ["--output_dir", str(tmp_path / "run"), "--log.evaluate", "none", "--runtime.device", "cpu"]
    assert run_command(short_run, line) == 5
    said = capsys.readouterr().err
    assert "out of memory" in said and "nothing is saved" in said and "--resume" not in said
