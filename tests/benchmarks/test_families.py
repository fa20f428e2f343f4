"""The yardstick of all families: its packs and counts at full size on the meta device, its rows at tiny size."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, families
from benchmarks.families import PAIRS, YARDSTICK, samples, useful_flops
from benchmarks.rows import Row, parse
from benchmarks.step import random_model
from benchmarks.trainers import packs_of
from engine.data.packing import filled_tokens, form_of
from models.linear import LoRA
from models.vlm import VisionLanguageModel
from tests.benchmarks.made_up_rows import ORIGIN

CPU = torch.device("cpu")


def tiny_rows(name: str, images: int) -> list[Row]:
    (case,) = (case for case in YARDSTICK.cases() if case.shape["model"] == name and case.shape["images"] == images)
    return list(YARDSTICK.rows(replace(case, shape={**case.shape, **YARDSTICK.tiny}), CPU, ORIGIN, True))


def on_meta(name: str) -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(PAIRS[name].model(is_tiny=False))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("images", [2, 0])
def test_samples_fill_one_pack_of_the_real_model(name: str, images: int) -> None:
    config = PAIRS[name].model(is_tiny=False)
    assert (
        config.tokens_per_tile == {"clip": 576, "eva": 576, "siglip": 729}[config.vision.family] or name == "LaVIN-7B"
    )
    work = samples(config, 2048, images)
    (pack,) = packs_of(work, 2048, "sample", form_of(config))
    assert pack.input_ids.numel() == 2048 and filled_tokens(pack) == work.tokens >= 2045
    assert pack.image_slots.numel() == images * config.tokens_per_tile
    assert not pack.input_ids[pack.image_slots].any() and not torch.isin(pack.image_slots, pack.supervised).any()
    assert (pack.tiles is None) == (images == 0) and work.images == images
    text = work.tokens - pack.image_slots.numel()
    assert 0.6 * text < int((pack.weights > 0).sum()) < 0.71 * text


def test_imps_model_has_lora_of_rank_256_on_every_linear_of_a_block() -> None:
    block = on_meta("Imp-Phi-2").language.blocks()[0]
    assert [module.a.shape[0] for module in block.modules() if isinstance(module, LoRA)] == [256] * 6


def test_operations_are_those_of_end_to_end() -> None:
    """Where both count: LLaMA's."""
    config = PAIRS["LaVIN-7B"].model(is_tiny=False)
    work = samples(config, 2048, 2)
    assert useful_flops(on_meta("LaVIN-7B"), work) == end_to_end.useful_flops(work, end_to_end.SHAPES["7B"].language)


@pytest.mark.parametrize(
    ("name", "images"),
    [("LaVIN-7B", 2), ("Imp-Phi-2", 0), ("Bunny-Phi-3-mini", 2), ("Bunny-StableLM-2-eva", 2)],
)
def test_a_case_makes_one_row_that_says_what_was_done(name: str, images: int) -> None:
    (row,) = tiny_rows(name, images)
    assert parse(row.flat()) == row and row.failure is None
    assert (row.variant, row.mode, row.timing) == ("nibble", "step", "steps") and row.loss
    assert row.tokens_per_s and row.samples_per_s and row.ms and row.flops and row.fraction
    assert row.tokens_per_s == pytest.approx(row.samples_per_s * (255 if images else 511))
    assert row.policy is not None and "save_all" in row.policy and "keep_input" not in row.policy
    assert row.ran is not None and row.ran["bits"] == [4, 16, 16] and row.ran["copies"] == 0


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(families, "settle", broken)
    (row,) = tiny_rows("LaVIN-7B", 0)
    assert row.failure == "RuntimeError: out of memory" and row.ms is None


def test_a_model_is_given_back_when_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "_made", {})
    config = PAIRS["Bunny-Phi-1.5"].model(is_tiny=True)

    def make() -> VisionLanguageModel:
        return random_model(config, CPU, dtype=torch.float32)

    first = weakref.ref(end_to_end.held("a", make, CPU))
    assert end_to_end.held("a", make, CPU) is first()
    end_to_end.held("b", make, CPU)
    assert first() is None


def test_updates_are_not_zero() -> None:
    """They are at the start of a training, and products with zeros draw less power."""
    model = random_model(PAIRS["Bunny-Phi-1.5"].model(is_tiny=True), CPU, dtype=torch.float32)
    updates = [module for module in model.modules() if isinstance(module, LoRA)]
    assert updates and all(lora.b.count_nonzero() == lora.b.numel() for lora in updates)
    block = model.language.blocks()[0]
    assert all(linear.quantized is not None for group in block.groups() for linear in group)
