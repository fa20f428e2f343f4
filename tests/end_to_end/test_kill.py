"""A run that is killed at any moment and started again with the same line is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import find_latest, load_checkpoint
from engine.files import step_dirs
from tests.end_to_end.conftest import World

REPOSITORY = Path(__file__).parents[2]
NUM_KILLS, NUM_STEPS = 4, 90
FLAGS = (
    "--optim.batch_size 8 --optim.epochs 30 --optim.lr 0.02 --log.every 1 --log.save_every 1 --log.lavin_checkpoints"
)
LIMIT = 120.0  # seconds for one step; only a run that hangs needs them


def start(world: World, run: Path) -> subprocess.Popen[str]:
    flags = [*world.scienceqa, *FLAGS.split(), "--output_dir", str(run), "--runtime.device", "cpu", "--resume", "auto"]
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=10 * LIMIT)
    assert process.returncode == 0, errors


def newest(run: Path) -> int:
    return max((number for number, _ in step_dirs(run)), default=0) if run.is_dir() else 0


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    until = time.monotonic() + LIMIT
    while newest(run) < step:
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        assert time.monotonic() < until, f"no step {step} after {LIMIT} s"
        time.sleep(0.002)


def rows(run: Path) -> list[Any]:
    content = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["lr"], row["samples"]) for row in content]


def test_killed_again_and_again(world: World, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(world, whole))
    rng = random.Random(0)
    for _ in range(NUM_KILLS):
        process = start(world, parts)
        try:
            wait_for_step(process, parts, newest(parts) + rng.randint(1, 6))
            time.sleep(rng.uniform(0, 0.1))
        finally:
            process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (parts / "exit.json").exists()
    assert newest(parts) < NUM_STEPS
    finish(start(world, parts))

    last = find_latest(parts)
    assert last == parts / f"step-{NUM_STEPS}"
    (expected, _), (got, _) = load_checkpoint(whole / last.name), load_checkpoint(last)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert rows(parts) == rows(whole)
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
