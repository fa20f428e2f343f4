"""A model with packed weights under DDP, FSDP2 and checkpointing: the steps are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.sharded import WORLD, Result, model_of, one_process, weights
from tests.models.tiny import assert_gradients_close

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected() -> Result:
    return one_process()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their files."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.models.sharded", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(WORLD)]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        for rank, log in zip(ranks, logs, strict=True):
            assert rank.wait(timeout=120) == 0, log.seek(0) or log.read()[-3000:]
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            log.close()
    return folder


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp-checkpointing"])
def test_two_ranks_are_one_process(folder: Path, expected: Result, way: str) -> None:
    found = load_file(folder / f"{way}.safetensors")
    assert_gradients_close(found, expected, tolerance=2e-5, floor=2e-7)
    first, second = (expected[f"{step}/loss"] for step in (0, 1))
    assert abs(first - second) > 1e-3 * first  # the first step did something


def test_checkpointing_changes_nothing(expected: Result) -> None:
    assert_gradients_close(one_process(checkpointing=True), expected, floor=2e-7)


def test_mixed_precision_does_not_round_the_scales(folder: Path) -> None:
    """FSDP2 gathers fp32 parameters as bf16 where it is told to."""
    found, exact = load_file(folder / "fsdp-bf16-weights.safetensors"), weights(model_of().language.layers[1])
    assert found.keys() == exact.keys() and len(exact) == 7
    assert all(torch.equal(found[name], weight) for name, weight in exact.items())
