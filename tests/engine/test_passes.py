"""Which runs have CUDA graphs, and what the others are told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from engine.config import Config, Runtime
from engine.distributed import Ranks
from engine.graphs import GraphedPasses
from engine.passes import choose_passes, graphs_obstacle
from tests.models.tiny import tiny_config, tiny_model

ALONE, CUDA = Ranks(0, 0, 1), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("runtime", "debug", "ranks", "device", "why"),
    [
        ({}, False, ALONE, CUDA, ""),
        ({}, False, ALONE, torch.device("cpu"), "none on a CPU"),
        ({"cuda_graphs": False}, False, ALONE, CUDA, "--runtime.cuda_graphs False"),
        ({}, False, Ranks(1, 1, 2), CUDA, "none with 2 ranks: DDP"),
        ({"deterministic": True}, False, ALONE, CUDA, "--runtime.deterministic"),
        ({}, True, ALONE, CUDA, "--debug"),
    ],
)
def test_why_there_are_no_graphs(
    runtime: dict[str, Any], debug: bool, ranks: Ranks, device: torch.device, why: str
) -> None:
    found = graphs_obstacle(Config(runtime=Runtime(**runtime), debug=debug), device, ranks)
    assert why in found and bool(why) == bool(found)


def test_what_was_chosen_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tiny_config(train_vision="frozen"))
    with caplog.at_level(logging.INFO, "nibble"):
        passes = choose_passes(Config(), model, torch.device("cpu"), ALONE, num_samples=7)
    assert not isinstance(passes, GraphedPasses) and passes.places is not None and passes.places.rows == 7
    assert [record.getMessage() for record in caplog.records] == [
        "the vision tower is frozen: its features of 7 images are kept",
        "CUDA graphs: none on a CPU",
    ]
    assert choose_passes(Config(), tiny_model(tiny_config()), torch.device("cpu"), ALONE, num_samples=7).places is None
