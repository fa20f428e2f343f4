"""What is free for a pass, and what is made of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import torch

from engine.config import Config
from engine.optim import Optimizer
from engine.plan import memory_budget
from engine.plan.accounting import costs
from engine.plan.cards import CARDS
from engine.plan.memory_budget import CONTEXT_BYTES, RESERVE, card_of, choose, free_bytes, largest_pack, resident_bytes
from engine.plan.meta_model import Bits
from engine.trainer import Trainer
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel
from tests.models.tiny import tiny_config, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


def a_config(**top: str | bool) -> Config:
    config = Config(bits="16bit", **top)  # type: ignore[arg-type]
    config.runtime.tokens_per_batch = config.dataset.max_seq_len = 256
    return config


@pytest.fixture
def model() -> VisionLanguageModel:
    return tiny_model(tiny_config())


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    def counting(*_: object, **__: object) -> NoReturn:
        raise AssertionError("counted")

    monkeypatch.setattr(memory_budget, "costs", counting)


@pytest.mark.usefixtures("uncounted")
def test_without_a_limit_and_with_the_flag_nothing_is_counted(model: VisionLanguageModel) -> None:
    free = choose(a_config(), model, None, CPU, torch.float32)
    assert free.policy == ActivationPolicy.uniform("save_all", 3, 6) and free.spare == 0
    for limit in (None, 0, 10**12):
        least = choose(a_config(gradient_checkpointing=True), model, limit, CPU, torch.float32)
        assert least.policy == ActivationPolicy.uniform("keep_input", 3, 6)
        assert (least.spare, least.why) == (0, "--gradient_checkpointing")


def test_what_is_kept_grows_with_what_is_free(
    model: VisionLanguageModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config()
    counted = costs(model.config, Bits(16, 16, 16), largest_pack(config), torch.float32, memory_budget.HOST)
    monkeypatch.setattr(memory_budget, "costs", lambda *_, **__: counted)  # once is enough
    base = counted.inputs + counted.buffers
    everything, leanest = (
        ActivationPolicy.uniform(policy, 3, 6) for policy in ("save_all", "keep_input")  # type: ignore[arg-type]
    )  # fmt: skip
    most, least = counted.peak(everything), counted.peak(leanest)
    assert most > least
    kept = []
    for free in (least, (least + most) // 2, most - 1, most, most + 1000):
        choice = choose(config, model, base + free, CPU, torch.float32)
        peak = counted.peak(choice.policy)
        assert peak <= free and choice.spare == free - peak
        kept.append(sum(counted.saved(choice.policy)))
        assert ("of recomputation" in choice.why) == (choice.policy != everything)
    assert kept == sorted(kept) and kept[2] < kept[3] == sum(counted.saved(everything))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert choose(config, model, base, CPU, torch.float32).spare == 0
    assert "expect to run out of memory" in caplog.text


def test_the_largest_pack() -> None:
    config = Config()
    pack = largest_pack(config)
    assert (pack.tokens, pack.supervised, pack.tiles, pack.longest) == (2048, 2048, 8, 512)
    config.runtime.tokens_per_batch, config.dataset.max_seq_len = 128, 700
    pack = largest_pack(config)
    assert (pack.tokens, pack.supervised, pack.tiles, pack.longest) == (768, 768, 2, 700)


def test_what_is_resident_is_each_memory_once(model: VisionLanguageModel) -> None:
    weights = sum(p.nbytes for p in model.parameters())
    assert resident_bytes(model, {}) == weights
    optimizer = Optimizer(model.named_parameters(), weight_decay=0.0)
    trained = sum(p.nbytes for p in model.trainable().values())
    with_state = resident_bytes(model, optimizer.state_tensors())
    assert weights + 3 * trained <= with_state < 1.1 * (weights + 3 * trained)  # gradient, two moments, alignment
    trainer = cast(Trainer, SimpleNamespace(model=model, optimizer=optimizer))
    assert free_bytes(Config(), trainer, CPU) is None
    assert free_bytes(Config(memory_budget="1GB"), trainer, CPU) == 10**9 - with_state


def test_a_gpu_gives_what_is_free_and_no_more_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("mem_get_info", (10 * GIB, 24 * GIB)), ("memory_allocated", 6 * GIB), ("memory_reserved", 7 * GIB),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    trainer = cast(Trainer, None)
    assert free_bytes(Config(), trainer, CUDA) == int(11 * GIB * (1 - RESERVE))
    asked = 9 * GIB - CONTEXT_BYTES - 6 * GIB
    assert free_bytes(Config(memory_budget="9GiB"), trainer, CUDA) == int(asked * (1 - RESERVE))
    assert free_bytes(Config(memory_budget="24GiB"), trainer, CUDA) == int(11 * GIB * (1 - RESERVE))


@pytest.mark.parametrize(
    ("name", "capability", "card"),
    [
        ("NVIDIA H200", (9, 0), "H200"), ("NVIDIA GeForce RTX 3090", (8, 6), "RTX 3090"),
        ("NVIDIA L40S", (8, 9), "RTX 4090"), ("NVIDIA B200", (10, 0), "H100"),
    ],
)  # fmt: skip
def test_the_card_that_runs(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], card: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert card_of(CUDA) in CARDS and card_of(CUDA).name == card
