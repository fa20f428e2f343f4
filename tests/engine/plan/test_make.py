"""The plan: what it says for a recipe, how long it takes, and that its remedies hold."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.flags import parse_train
from engine.plan.accounting import costs
from engine.plan.cards import CARDS, card_named
from engine.plan.make import Plan, plan_text, plan_without_weights
from engine.plan.memory_budget import largest_pack
from engine.plan.meta_model import Bits
from engine.plan.speed import predicted
from models.language.llama import LLAMA_7B, LLAMA_13B
from models.recompute import ActivationPolicy
from models.vision.clip import ClipConfig
from models.vlm import VLMConfig

ROOT = Path(__file__).parents[3]
SECONDS = 5  # that a plan may take


def plan(*line: str, recipe: str = "lavin-13b") -> Plan:
    config, _ = parse_train(["--recipe", str(ROOT / f"recipes/{recipe}.yaml"), *line])
    return plan_without_weights(config, 1)


def test_train_py_prints_it_in_five_seconds_without_weights(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "train.py", "--recipe", ROOT / "recipes/lavin-7b-lite.yaml", "--plan", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # the processor's time, so that a busy machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    said = json.loads(done.stdout)
    assert {card["card"] for card in said["cards"]} == {card.name for card in CARDS}
    assert said["trainable_parameters"] == 3_781_296
    assert sum(size for part, size in said["memory_bytes"].items() if part != "total") == said["memory_bytes"]["total"]
    assert all(card["fits"] and card["hours"] > 0 and not card["remedy"] for card in said["cards"])


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
    shape = largest_pack(parse_train([])[0])
    counted = costs(VLMConfig(language=language, vision=ClipConfig()), Bits(), shape, torch.bfloat16, CARDS[-1])
    policy = ActivationPolicy.uniform("save_all", language.num_layers, 24)
    for name, anchor in anchors.items():
        card = next(card for card in CARDS if card.name == name)
        assert predicted(counted, shape, policy, card).samples_per_second == pytest.approx(anchor, rel=0.1)


def test_cards_by_the_drivers_names() -> None:
    names = ("NVIDIA H200", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA GeForce RTX 3090", "Tesla T4")
    found = [card.name if (card := card_named(name)) else None for name in names]
    assert found == ["H200", "A100 40 GB", "A100 80 GB", "RTX 3090", None]
