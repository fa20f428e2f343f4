"""The plan: what it says for a recipe, how long it takes, and that its remedies hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_model
from engine.flags import parse_train
from engine.plan.accounting import costs
from engine.plan.cards import CARDS, card_named
from engine.plan.make import Plan, make_plan, plan_text, plan_without_weights
from engine.plan.memory_budget import RESERVE, largest_pack
from engine.plan.meta_model import Bits
from engine.plan.speed import predicted
from engine.sources import open_sources
from models.language.llama import LLAMA_7B, LLAMA_13B
from models.recompute import ActivationPolicy
from models.vision.clip import ClipConfig
from models.vlm import VLMConfig
from tests.world import make_base, make_tokenizer

ROOT = Path(__file__).parents[3]
FIXED = ("language layers", "embedding", "head", "vision tower", "adapters and other trained weights", "gradients",
         "optimizer", "cuda context")  # fmt: skip


@cache
def plan(*line: str, recipe: str = "lavin-13b") -> Plan:
    config, _ = parse_train(["--recipe", str(ROOT / f"recipes/{recipe}.yaml"), *line])
    return plan_without_weights(config, 1)


def test_train_py_prints_it_without_weights(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "train.py", "--recipe", ROOT / "recipes/lavin-7b-lite.yaml", "--plan", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    said = json.loads(done.stdout)
    assert {card["card"] for card in said["cards"]} == {card.name for card in CARDS}
    assert said["trainable_parameters"] == 3_781_296
    assert sum(size for part, size in said["memory_bytes"].items() if part != "total") == said["memory_bytes"]["total"]
    assert all(card["fits"] and card["hours"] > 0 and not card["remedy"] for card in said["cards"])


def test_a_pass_is_counted_once_for_all_cards() -> None:
    """A plan takes seconds for what it counts."""
    costs.cache_clear()
    config, _ = parse_train(["--recipe", str(ROOT / "recipes/lavin-7b-lite.yaml")])
    plan_without_weights(config, 1)
    assert costs.cache_info().misses == 1


def test_what_does_not_fit_gets_a_remedy_that_holds() -> None:
    small = {verdict.card: verdict for verdict in plan().cards}["RTX 3090"]
    assert not small.fits and small.peak_bytes > small.memory_bytes["language layers"] > 23 * 2**30
    again = {verdict.card: verdict for verdict in plan(*small.remedy.split()).cards}["RTX 3090"]
    assert small.remedy == "--bits 8bit" and again.fits


def test_combined_remedies_where_none_is_enough() -> None:
    verdict = plan("--memory_budget", "9GB", recipe="lavin-13b-lite").cards[0]
    assert not verdict.fits and verdict.remedy.count("--") > 1
    again = plan("--memory_budget", "9GB", *verdict.remedy.split(), recipe="lavin-13b-lite").cards[0]
    assert again.fits and again.peak_bytes <= 9e9


def test_more_copies_than_there_is_room_for_have_a_remedy() -> None:
    verdict = plan("--runtime.unpacked_memory", "30GB", recipe="lavin-13b-lite").cards[0]
    assert not verdict.fits and verdict.remedy == "--runtime.unpacked_memory auto"
    assert plan("--runtime.unpacked_memory", "auto", recipe="lavin-13b-lite").cards[0].fits


def test_what_fits_leaves_the_reserve_of_a_run() -> None:
    needed = plan("--gradient_checkpointing", recipe="lavin-7b-lite").cards[0]
    fixed = sum(needed.memory_bytes[part] for part in FIXED)
    tight, roomy = (
        plan("--memory_budget", f"{size / 1e6:.0f}MB", recipe="lavin-7b-lite").cards[0]
        for size in (needed.peak_bytes + 1e7, fixed + (needed.peak_bytes - fixed) / (1 - RESERVE) + 1e7)
    )
    assert needed.peak_bytes < tight.limit_bytes and not tight.fits and roomy.fits, "settle_memory would warn, too"
    lines = plan_text(plan("--memory_budget", f"{tight.limit_bytes / 1e6:.0f}MB", recipe="lavin-7b-lite")).splitlines()
    assert any("does not fit into --memory_budget" in line and "with the reserve of a run" in line for line in lines)


def test_a_quantised_head_takes_a_buffer_beside_16_bit_layers() -> None:
    memory = plan("--bits_head", "4bit", recipe="lavin-7b").memory_bytes
    assert memory["dequantisation buffer"] == 2 * 32000 * 4096
    assert plan(recipe="lavin-7b").memory_bytes["dequantisation buffer"] == 0


def test_products_in_fp32_are_slower() -> None:
    line = ("--bits", "16bit", "--log.no_lavin_checkpoints")
    fp32, bf16 = (
        plan(*line, "--runtime.precision", precision, recipe="lavin-7b").cards[-1] for precision in ("fp32", "bf16")
    )
    assert fp32.tokens_per_second < 0.2 * bf16.tokens_per_second, "67 of 790 TFLOP/s"


def test_small_steps_have_small_packs() -> None:
    whole, single = (
        plan("--optim.accum_iter", count, "--runtime.unpacked_memory", "0", recipe="lavin-7b-lite").cards[0]
        for count in ("32", "1")
    )
    assert single.samples_per_second < 0.85 * whole.samples_per_second, "weights are unpacked for each sample"


def test_hours_are_those_of_the_data() -> None:
    verdict = plan(recipe="lavin-7b-lite").cards[-1]
    assert verdict.hours == pytest.approx(20 * 12_726 / verdict.samples_per_second / 3600)
    chat = plan(recipe="lavin-13b-chat")
    assert all(card.hours is None for card in chat.cards) and "hours: once the data are read" in plan_text(chat)


def test_off_a_gpu_a_budget_holds_too() -> None:
    line = ("--runtime.device", "cpu", "--runtime.precision", "bf16")
    free, bound = (plan(*line, *more, recipe="lavin-7b-lite") for more in ((), ("--memory_budget", "8GB")))
    assert "save_all x 32" in free.policy and "save_all x 32" not in bound.policy
    assert bound.memory_bytes["total"] <= 8e9 < free.memory_bytes["total"]


def test_this_gpu_comes_first() -> None:
    config, _ = parse_train(["--recipe", str(ROOT / "recipes/lavin-7b-lite.yaml")])
    shapes = VLMConfig(language=LLAMA_7B, vision=ClipConfig())
    here = replace(CARDS[0], name="NVIDIA GeForce RTX 3090", memory=9 * 2**30)  # somebody else has the rest
    found = make_plan(config, shapes, "7B", num_ranks=1, samples=1000, card=here)
    assert found.here is not None and found.here.fits and found.here.peak_bytes <= 9 * 2**30 < found.cards[0].peak_bytes
    assert (found.policy, found.memory_bytes) == (found.here.policy, found.here.memory_bytes)
    assert found.here.hours == pytest.approx(20 * 1000 / found.here.samples_per_second / 3600)
    lines = plan_text(found).splitlines()
    first = next(n for n, line in enumerate(lines) if "NVIDIA GeForce RTX 3090, 9.00 GiB for this run: fits" in line)
    assert first < next(n for n, line in enumerate(lines) if line.startswith("RTX 3090"))


def test_little_is_said_of_a_little_model() -> None:
    config, _ = parse_train([])
    text = plan_text(plan_without_weights(config, 1))
    assert len(text.splitlines()) == 6 and "fits all of RTX 3090" in text and "cache of" not in text


def test_the_cache_has_the_planned_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base").mkdir()
    make_tokenizer(tmp_path / "base" / "tokenizer.model")
    make_base(tmp_path / "base", tmp_path / "base" / "tokenizer.model")
    line = ["--model.language", str(tmp_path / "base"), "--model.vision", str(tmp_path / "base" / "tower"),
            "--runtime.device", "cpu", "--bits_head", "8bit", "--bits_vision", "4bit"]  # fmt: skip
    config, _ = parse_train(line)
    planned = plan_without_weights(config, 1).disk_bytes["cache of quantised weights"]
    build_model(config, open_sources(config), device=torch.device("cpu"), dtype=torch.float32)
    (written,) = (tmp_path / "cache").rglob("weights.safetensors")
    assert planned == written.stat().st_size


def test_a_budget_makes_the_layers_keep_less() -> None:
    free, bound = (plan("--no_gradient_checkpointing", *line, recipe="lavin-13b-lite").cards[-1]
                   for line in ((), ("--memory_budget", "14GB")))  # fmt: skip
    assert "save_all x 40" in free.policy and "save_all x 40" not in bound.policy
    assert bound.fits and bound.peak_bytes <= 14e9
    assert bound.samples_per_second < free.samples_per_second
    assert free.copied_layers == 40, "an H200 has room for all layers unpacked"


def test_the_text() -> None:
    text = plan_text(plan())
    assert "does not fit; with --bits 8bit it does" in text and "predicted" in text
    assert all(card.name in text for card in CARDS)
    assert max(map(len, text.splitlines())) <= 120
    assert "A100" not in plan_text(plan("--runtime.device", "cpu")), "no verdicts for a run on the CPU"


# performance anchors of the project, 3.3: samples/s at packs of 2,048 tokens, each kind of op at its own roof
@pytest.mark.parametrize(
    ("language", "anchors"),
    [
        (LLAMA_7B, {"RTX 3090": 7.7, "A100 80 GB": 31.0, "H200": 77.5}),
        (LLAMA_13B, {"RTX 3090": 4.06, "A100 80 GB": 16.5, "H200": 41.1}),
    ],
    ids=["7B", "13B"],
)
def test_the_roofline_is_that_of_the_anchors(language: Any, anchors: dict[str, float]) -> None:
    model = VLMConfig(language=language, vision=ClipConfig())
    shape = largest_pack(parse_train([])[0], model)
    counted = costs(model, Bits(), shape, torch.bfloat16, CARDS[-1].capability)
    policy = ActivationPolicy.uniform("save_all", language.num_layers, 24)
    for name, anchor in anchors.items():
        card = next(card for card in CARDS if card.name == name)
        assert predicted(counted, shape, policy, card).samples_per_second == pytest.approx(anchor, rel=0.1)


def test_cards_by_the_drivers_names() -> None:
    names = ("NVIDIA H200", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA GeForce RTX 3090", "Tesla T4")
    found = [card.name if (card := card_named(name)) else None for name in names]
    assert found == ["H200", "A100 40 GB", "A100 80 GB", "RTX 3090", None]
