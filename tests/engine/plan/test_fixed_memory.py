"""What is there before a pack, counted from shapes, beside what a built model and its optimiser hold."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from engine.build import bits_of as bits_by_part
from engine.config import BITS, Config
from engine.optim import Optimizer
from engine.plan.fixed_memory import bits_of, frozen_bytes, training_bytes
from engine.plan.memory_budget import resident_bytes
from engine.plan.meta_model import META
from models.placement import fill
from models.vlm import VisionLanguageModel
from tests.models.tiny import tiny_config, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [("16bit",) * 3, ("4bit", "16bit", "16bit"), ("4bit",) * 3, ("8bit",) * 3])
def test_weights_and_what_trains_to_the_byte(bits: tuple[str, str, str]) -> None:
    config = Config(bits=bits[0], bits_head=bits[1], bits_vision=bits[2])  # type: ignore[arg-type]
    assert astuple(bits_of(config)) == tuple(BITS[text] for text in bits)
    source = tiny_model(tiny_config())
    with META:
        model, shapes = VisionLanguageModel(source.config), VisionLanguageModel(source.config)
    model.start_trainable(0, CPU)
    for part, of_name in bits_by_part(config).items():
        stream = ((n, p.data) for n, p in source.get_submodule(part).named_parameters() if "_adapter." not in n)
        fill(model.get_submodule(part), stream, bits=of_name, device=CPU, dtype=torch.float32, source="test")
    optimizer = Optimizer(model.named_parameters(), weight_decay=0.0)
    planned = frozen_bytes(shapes, bits_of(config), 4) | training_bytes(shapes, 1)
    assert sum(planned.values()) == resident_bytes(model, optimizer.state_tensors())
    assert training_bytes(shapes, 2)["gradients"] == 2 * planned["gradients"]
