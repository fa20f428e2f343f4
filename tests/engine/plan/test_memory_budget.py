"""What is free for a pass, and what is made of it: the same by a plan and by a run."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

from engine.config import Config, longest_sample
from engine.data.packing import plan_packs
from engine.data.padding import padded_segments
from engine.data.planning import MODALITY_ROWS, round_up
from engine.plan import accounting, memory_budget
from engine.plan.cards import CARDS
from engine.plan.memory_budget import (
    CONTEXT_BYTES,
    RESERVE,
    card_of,
    choose,
    counted,
    device_memory,
    free_bytes,
    largest_pack,
)
from engine.plan.unpacked_memory import asked_for, least_scratch, share_of
from engine.plan.verdict import Planner
from models.language.llama import LLAMA_7B
from models.recompute import ActivationPolicy
from models.vision.clip import ClipConfig
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models.tiny import tiny_config, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
H200 = CARDS[-1]
FP32 = torch.float32
LAVIN_7B = VLMConfig(language=LLAMA_7B, vision=ClipConfig())


def a_config(bits: str = "16bit", **top: str | bool) -> Config:
    config = Config(bits=bits, **top)  # type: ignore[arg-type]
    config.runtime.tokens_per_batch = 384
    config.dataset.max_seq_len = 256
    return config


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return tiny_model(tiny_config())


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    def counting(*_: object, **__: object) -> NoReturn:
        raise AssertionError("counted")

    monkeypatch.setattr(memory_budget, "costs", counting)


@pytest.mark.usefixtures("uncounted")
def test_without_a_limit_and_with_the_flag_nothing_is_counted(model: VisionLanguageModel) -> None:
    free = choose(a_config(), model, None, None, FP32)
    assert free.policy == ActivationPolicy.uniform("save_all", 3, 6) and free.spare == 0
    for limit in (None, 0, 10**12):
        least = choose(a_config(gradient_checkpointing=True), model, limit, None, FP32)
        assert least.policy == ActivationPolicy.uniform("keep_input", 3, 6)
        assert (least.spare, least.why) == (0, "--gradient_checkpointing")


@pytest.mark.parametrize("card", [None, H200])
def test_what_is_kept_grows_with_what_is_free(model: VisionLanguageModel, card: Any) -> None:
    config = a_config()
    found = counted(config, model, FP32, on_cuda=card is not None)
    base = found.inputs + found.buffers
    everything, leanest = (ActivationPolicy.uniform("save_all", 3, 6), ActivationPolicy.uniform("keep_input", 3, 6))
    most, least = found.peak(everything), found.peak(leanest)
    assert most > least
    kept = []
    for free in (least, (least + most) // 2, most - 1, most, most + 1000):
        choice = choose(config, model, base + free, card, FP32)
        peak = found.peak(choice.policy)
        assert choice.fits and peak <= free and choice.spare == free - peak
        kept.append(sum(found.saved(choice.policy)))
        assert ("of recomputation" in choice.why) == (choice.policy != everything)
    assert kept == sorted(kept) and kept[2] < kept[3] == sum(found.saved(everything))
    nothing = choose(config, model, base, card, FP32)
    assert (nothing.fits, nothing.spare) == (False, 0)


def test_a_pack_is_counted_once_for_every_card_and_for_plan_and_run(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[VisionLanguageModel] = []
    real = accounting.cut_down

    def cut_down(*arguments: Any) -> VisionLanguageModel:
        models.append(real(*arguments))
        return models[-1]

    monkeypatch.setattr(accounting, "cut_down", cut_down)
    config = a_config(bits="4bit")
    config.runtime.tokens_per_batch = 896  # which no other test counts
    planner = Planner(model.config, num_ranks=1, dtype=FP32, on_cuda=True)
    for card in CARDS:
        planner.on(config, card)
        choose(config, model, 10**9, card, FP32)
    assert len(models) == 1


@pytest.mark.parametrize("on_cuda", [True, False])
def test_a_plan_chooses_as_a_run_does_with_a_budget(model: VisionLanguageModel, on_cuda: bool) -> None:
    """The run has what the plan takes to be there; the budget is one at which layers differ."""
    planner = Planner(model.config, num_ranks=1, dtype=FP32, on_cuda=on_cuda)
    resident = sum(planner.fixed(a_config()).values())
    found = counted(a_config(), model, FP32, on_cuda=on_cuda)
    ends = [ActivationPolicy.uniform("save_all", 3, 6), ActivationPolicy.uniform("keep_input", 3, 6)]
    most, least = map(found.peak, ends)
    between = (most + least) // 2 + found.inputs + found.buffers
    config = a_config(memory_budget=f"{(resident + between / (1 - RESERVE * on_cuda)) / 10**6:.6f}MB")
    free = free_bytes(config, resident, H200.memory if on_cuda else None)
    ran = choose(config, model, free, H200 if on_cuda else None, FP32)
    assert ran.policy not in ends
    assert planner.on(config, H200).policy == ran.policy


def test_what_is_asked_for_copies_is_not_there_for_activations(model: VisionLanguageModel) -> None:
    config = a_config(bits="4bit")
    found = counted(config, model, FP32, on_cuda=True)
    everything = ActivationPolicy.uniform("save_all", 3, 6)
    free = found.peak(everything) + found.inputs + found.buffers
    assert choose(config, model, free, H200, FP32).policy == everything
    layer = 4 * (4 * 32 * 32 + 3 * 32 * 128)  # groups are aligned
    config.runtime.unpacked_memory = f"{layer / 10**6:.6f}MB"
    asked = asked_for(config, model.language, 4, on_cuda=True)
    assert 0 < asked <= layer
    lean = choose(config, model, free, H200, FP32)
    assert found.peak(lean.policy) + asked <= found.peak(everything)
    model.use_activation_policy(lean.policy)
    share = share_of(config, model.language, 4, on_cuda=True)
    assert share is not None
    taken = share.scratch + share.copies - least_scratch(config, model.language, 4, on_cuda=True)
    assert 0 < taken <= asked
    model.use_activation_policy(everything)


@pytest.mark.parametrize(
    ("asked", "longest", "samples", "tokens", "tiles", "segments"),
    [
        (2048, 512, 32, 2048, 8, 48), (2100, 512, 32, 2048, 8, 48), (512, 512, 32, 640, 2, 48),
        (128, 700, 32, 768, 2, 48), (65536, 512, 32, 16384, 32, 48), (8192, 512, 3, 1536, 4, 16),
        (2048, 512, 1, 640, 2, 16), (512, 512, 4096, 640, 2, 656),
    ],
)  # fmt: skip
def test_the_largest_pack(asked: int, longest: int, samples: int, tokens: int, tiles: int, segments: int) -> None:
    config = Config()
    config.runtime.tokens_per_batch, config.dataset.max_seq_len, config.optim.batch_size = asked, longest, samples
    pack = largest_pack(config, LAVIN_7B)
    assert (pack.supervised, pack.longest) == (pack.tokens, longest)
    assert (pack.tokens, pack.tiles, pack.segments) == (tokens, tiles, segments)


def test_lavins_chat_data_are_as_long_as_it_cuts_them() -> None:
    config = Config()
    config.dataset.max_seq_len, config.runtime.tokens_per_batch, config.legacy.chat_length = 128, 128, True
    assert largest_pack(config, LAVIN_7B).tokens == 256
    config.dataset.format = "chat"
    assert (largest_pack(config, LAVIN_7B).tokens, largest_pack(config, LAVIN_7B).longest) == (640, 512)


@pytest.mark.parametrize("asked", [300, 512, 1000, 4096, 10**5])
def test_no_pack_of_a_step_is_larger(asked: int) -> None:
    config = Config()
    config.runtime.tokens_per_batch = asked
    samples, largest = config.optim.samples_per_step(1), largest_pack(config, LAVIN_7B)
    for length in (longest_sample(config) - 1, 60, 200):
        packs = plan_packs([length] * samples, asked, tiles=[1] * samples)
        assert max(round_up(MODALITY_ROWS + length * len(pack)) for pack in packs) <= largest.tokens
        assert max(map(len, packs)) <= largest.tiles
    packs = plan_packs([12] * samples, asked)
    assert padded_segments(MODALITY_ROWS + max(map(len, packs)) + 1) <= largest.segments


def test_a_gpu_gives_what_is_free_and_no_more_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("mem_get_info", (10 * GIB, 24 * GIB)), ("memory_allocated", 6 * GIB), ("memory_reserved", 7 * GIB),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    memory = device_memory(CUDA)
    assert free_bytes(Config(), *memory) == int(11 * GIB * (1 - RESERVE))
    asked = 9 * GIB - CONTEXT_BYTES - 6 * GIB
    assert free_bytes(Config(memory_budget="9GiB"), *memory) == int(asked * (1 - RESERVE))
    assert free_bytes(Config(memory_budget="24GiB"), *memory) == int(11 * GIB * (1 - RESERVE))


def test_a_cpu_has_no_limit_but_the_one_that_is_asked_for() -> None:
    assert free_bytes(Config(), 5, None) is None
    assert free_bytes(Config(memory_budget="1GB"), 5, None) == 10**9 - 5


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
    found = card_of(CUDA)
    assert found in CARDS and found is not None and found.name == card
    assert card_of(CPU) is None


@pytest.mark.parametrize("train", ["mma", "frozen"])
def test_a_frozen_towers_features_are_there_before_a_pack(train: Any) -> None:
    """128 MiB of rows of [6, 24] in fp32, one of zeros, and one for each image that a pack may have."""
    planner = Planner(tiny_config(train_vision=train), num_ranks=1, dtype=FP32, on_cuda=True)
    row = 6 * 24 * 4
    table = (2**27 // row + 1 + 8) * row
    assert planner.fixed(Config()).get("image features") == (table if train == "frozen" else None)
