"""What a run finds free, and what it says of its choice."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.config import Config
from engine.distributed import Ranks
from engine.optim import Optimizer
from engine.plan.memory_budget import MemoryChoice, resident_bytes
from engine.settle import RECORDED, free_of, settle_memory
from engine.setup import Setup
from engine.trainer import Trainer
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel
from tests.models.tiny import tiny_config, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def model() -> VisionLanguageModel:
    return tiny_model(tiny_config())


def test_what_is_resident_is_each_memory_once(model: VisionLanguageModel) -> None:
    weights = sum(p.nbytes for p in model.parameters())
    assert resident_bytes(model, {}) == weights
    optimizer = Optimizer(model.named_parameters(), weight_decay=0.0)
    trained = sum(p.nbytes for p in model.trainable().values())
    with_state = resident_bytes(model, optimizer.state_tensors())
    assert weights + 3 * trained <= with_state < 1.1 * (weights + 3 * trained)  # gradient, two moments, alignment
    trainer = cast(Trainer, SimpleNamespace(model=model, optimizer=optimizer))
    assert free_of(Config(), trainer, CPU) is None
    assert free_of(Config(memory_budget="1GB"), trainer, CPU) == 10**9 - with_state


@pytest.mark.parametrize("fits", [True, False])
def test_a_choice_is_applied_recorded_and_taken_up_and_warns_where_it_does_not_fit(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fits: bool
) -> None:
    policy = ActivationPolicy.uniform("recompute_mlp", 3, 6)
    choices: list[Any] = []

    def choose(*arguments: Any) -> MemoryChoice:
        choices.append(arguments)
        return MemoryChoice(policy, 7, "because", fits)

    monkeypatch.setattr("engine.settle.choose", choose)
    monkeypatch.setattr("engine.settle.free_of", lambda *_: 5)
    setup: Any = SimpleNamespace(config=Config(), model=model, device=CPU, ranks=Ranks(0, 0, 1))
    trainer: Any = SimpleNamespace(state_extras={})
    with caplog.at_level(logging.WARNING):
        assert settle_memory(cast(Setup, setup), cast(Trainer, trainer), torch.float32) == 7
    assert choices == [(setup.config, model, 5, None, torch.float32)]
    assert model.activation_policy == policy
    assert ("because: expect to run out of memory" in caplog.text) == (not fits)
    assert [trainer.state_extras[name] for name in RECORDED] == [
        policy.to_json(), 7, [False, "", 2048, "auto", False, "auto"],
    ]  # fmt: skip
    model.use_activation_policy(ActivationPolicy.uniform("save_all", 3, 6))
    assert settle_memory(cast(Setup, setup), cast(Trainer, trainer), torch.float32) == 7
    assert len(choices) == 1 and model.activation_policy == policy
    setup.config.runtime.unpacked_memory = "1GB"  # copies that the choice did not leave room for
    settle_memory(cast(Setup, setup), cast(Trainer, trainer), torch.float32)
    assert len(choices) == 2
