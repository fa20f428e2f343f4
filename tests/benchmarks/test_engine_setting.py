"""A benchmark's run settles what a run of the engine would, and is predicted by the plan's own accounting."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import engine_setting
from benchmarks.engine_setting import configuration, predict, settle, shape_of
from benchmarks.step import MODELS, TOWER, build
from benchmarks.trainers import packs_of
from benchmarks.workload import workload
from engine.data.padding import pad
from engine.plan.cards import CARDS
from engine.plan.memory_budget import CONTEXT_BYTES, choose, free_bytes, largest_pack
from engine.plan.unpacked_memory import share_of, share_text
from engine.plan.verdict import Planner
from kernels import unpacked
from models.pack import Pack
from models.vlm import VisionLanguageModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP32, H200 = torch.float32, CARDS[-1]
LONGEST = 64


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return build(MODELS["toy"], 2, CPU, tower=TOWER, dtype=FP32)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A GPU whose driver tells figures, and nothing that runs on it: what would be launched is noted."""
    found = {"free": 10**9, "allocated": 10**6, "kept": 0, "scratch": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (found["free"], 10**12))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: found["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: found["allocated"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")

    def keep(group: Any, dtype: torch.dtype) -> None:
        found["kept"] += 1

    def configure(scratch_bytes: int = 0, prefetch: bool = False) -> None:
        found["scratch"] = scratch_bytes

    monkeypatch.setattr(unpacked, "keep", keep)
    monkeypatch.setattr(unpacked, "configure", configure)
    yield found


def packs(tokens: int = 128, samples: int = 4) -> list[Pack]:
    work = workload(samples, MODELS["toy"].vocab_size, TOWER.image_size, longest=LONGEST)
    return [pad(pack) for pack in packs_of(work, tokens, "sample")]


@pytest.mark.parametrize(("free", "much"), [(10**9, True), (10**6, False)])
def test_it_is_the_engines_own_choice(
    vlm: VisionLanguageModel, on_gpu: dict[str, int], free: int, much: bool
) -> None:  # fmt: skip
    on_gpu["free"] = free
    config = configuration("auto", 128, 4, LONGEST, 0)
    setting = settle(config, vlm, "auto", CUDA)
    resident = on_gpu["allocated"] + CONTEXT_BYTES
    choice = choose(config, vlm, free_bytes(config, resident, resident + free), H200, FP32)
    assert setting.policy == choice.policy == vlm.activation_policy
    assert setting.share == share_of(config, vlm.language, 4, on_cuda=True, spare=choice.spare)
    assert on_gpu["kept"] == 4 * setting.share.num_copied and on_gpu["scratch"] == setting.share.scratch
    assert setting.share.num_copied == (2 if much else 0)
    assert (set(choice.policy.language) == {"save_all"}) == much


def test_a_cap_is_a_memory_budget_and_a_policy_has_no_copies(
    vlm: VisionLanguageModel, on_gpu: dict[str, int]
) -> None:  # fmt: skip
    assert configuration("auto", 128, 4, LONGEST, 24).memory_budget == "24GB"
    assert settle(configuration("auto", 128, 4, LONGEST, 0), vlm, "auto", CUDA).share.num_copied == 2
    on_gpu["allocated"] = 24 * 10**9 - CONTEXT_BYTES - 10**6  # nearly all of the budget; the card has more
    lean = settle(configuration("auto", 128, 4, LONGEST, 24), vlm, "auto", CUDA)
    assert "save_all" not in lean.policy.language and lean.share.num_copied == 0
    on_gpu["kept"] = 0
    for wanted in ("save_all", "recompute_mlp", "keep_input"):
        asked = settle(configuration(wanted, 128, 4, LONGEST, 24), vlm, wanted, CUDA)
        assert {*asked.policy.language, *asked.policy.vision} == {wanted} and asked.share.num_copied == 0
    assert asked.config.gradient_checkpointing and on_gpu["kept"] == 0
    with pytest.raises(ValueError, match="no such policy"):
        settle(configuration("lean", 128, 4, LONGEST, 0), vlm, "lean", CUDA)


def test_what_is_predicted_of_the_largest_pack_is_what_the_plan_says(vlm: VisionLanguageModel) -> None:
    """Where the packs that ran are the largest that could be: to the byte, but for the CUDA context."""
    config = configuration("auto", 256, 32, LONGEST, 0)
    planner = Planner(vlm.config, num_ranks=1, dtype=FP32, on_cuda=True)
    outlook = planner.on(config, H200)
    choice = planner.choice(config, H200)
    share = share_of(config, planner.model.language, 4, on_cuda=True, spare=choice.spare)
    assert share is not None and share.num_copied == outlook.copied_layers
    pack = largest_pack(config, vlm.config)
    sizes = [pack.tokens, pack.supervised, pack.segments, pack.tiles, pack.pairs, pack.longest]
    ran = {
        "bits": [4, 16, 16], "policy": choice.policy.to_json(), "scratch": share.scratch, "copies": share.copies,
        "copied_layers": share.num_copied, "packs": [sizes], "tokens": 250,
    }  # fmt: skip
    found = predict(vlm.config, ran, FP32, H200)
    assert found.bytes == outlook.memory["total"] - CONTEXT_BYTES
    twice = predict(vlm.config, ran | {"packs": [sizes, sizes], "tokens": 500}, FP32, H200)
    assert twice == found
    slower = predict(vlm.config, ran | {"copied_layers": 0, "copies": 0}, FP32, H200)
    assert slower.tokens_per_s < found.tokens_per_s and slower.bytes < found.bytes
    fewer = [pack.tokens, pack.supervised, pack.segments, 0, pack.pairs, pack.longest]
    mixed = predict(vlm.config, ran | {"packs": [fewer, sizes], "tokens": 500}, FP32, H200)
    assert mixed.tokens_per_s > found.tokens_per_s and mixed.bytes == found.bytes


def test_a_row_records_what_ran(
    vlm: VisionLanguageModel, on_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    setting = settle(configuration("auto", 128, 4, LONGEST, 0), vlm, "auto", CUDA)
    done = packs()
    fields = setting.fields(vlm.config, done, 180, CUDA)
    ran = json.loads(json.dumps(fields["ran"]))  # as a row is read
    assert len(ran["packs"]) == len(done) and ran["tokens"] == 180
    found = predict(vlm.config, ran, FP32, H200)
    assert (fields["plan_bytes"], fields["plan_tokens_per_s"]) == (found.bytes, found.tokens_per_s)
    assert fields["policy"] == setting.policy.describe()
    assert fields["setting"] == share_text(setting.share, 2) and "copies of 2 of 2 layers" in fields["setting"]
    monkeypatch.setattr(engine_setting, "predict", None)
    on_cpu = setting.fields(vlm.config, done, 180, CPU)
    assert on_cpu["plan_bytes"] is None and on_cpu["ran"] == fields["ran"]


def test_the_counted_pack_is_the_pack() -> None:
    (pack,) = packs(512)
    shape = shape_of(pack)
    assert (shape.tokens, shape.supervised, shape.tiles) == (256, pack.supervised.numel(), 2)
    lengths = pack.segments.cu_seqlens.diff().tolist()
    assert shape.pairs == sum(length**2 for length in lengths) // 2
