"""The plan against benchmarks/results, and that the comparison can fail. No figure in here was ever measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plan_check
from benchmarks.end_to_end import SHAPES
from benchmarks.engine_setting import Prediction, predict
from benchmarks.plan_check import CLAIM, head, misses, model_of, prediction, unbacked
from benchmarks.rows import Row, parse, read
from engine.plan.cards import CARDS
from models.recompute import ActivationPolicy
from models.vlm import VLMConfig
from tests.benchmarks.made_up_rows import row

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TOY = SHAPES["toy"]
RAN = {
    "bits": [4, 16, 16], "policy": ActivationPolicy.uniform("save_all", 2, 6).to_json(), "scratch": 0, "copies": 0,
    "copied_layers": 0, "packs": [[256, 192, 16, 2, 4096, 512]], "tokens": 240,
}  # fmt: skip


@cache
def planned() -> Prediction:
    return predict(VLMConfig(language=TOY.language, vision=TOY.tower), RAN, torch.bfloat16, CARDS[-1])


def recorded() -> list[Row]:
    return read(ROOT / "benchmarks/results")


def run(memory: float = 1.0, speed: float = 1.0, **values: Any) -> Row:
    """On the card called Made-Up H200; `memory`, `speed`: what was measured, of what is predicted."""
    measured = {
        "allocated_bytes": round(planned().bytes * memory), "tokens_per_s": planned().tokens_per_s * speed, "ran": RAN,
    }  # fmt: skip
    found = row("end_to_end", {"model": "toy", "T": 256}, "step", **measured | values)
    return parse(found.flat()) if found.bytes is None else found


def test_what_was_measured_is_predicted() -> None:
    assert misses(recorded()) == []


def test_recipes_claim_nothing_without_a_row() -> None:
    assert RECIPES
    assert unbacked(RECIPES, recorded()) == []


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (lambda: run(memory=1 / 1.051), "memory +5.1% off"),
        (lambda: run(memory=1 / 0.949), "memory -5.1% off"),
        (lambda: run(speed=1 / 1.21), "tokens/s +21.0% off"),
        (lambda: run(speed=1 / 0.79), "tokens/s -21.0% off"),
        (lambda: run(tokens_per_s=None), "tokens/s was not measured"),
        (lambda: run(ran=None), "does not say what ran"),
    ],
)
def test_a_prediction_that_is_off_is_named(row: Any, what: str) -> None:
    (miss,) = misses([run(), row()])
    assert what in miss and "Made-Up H200, model=toy T=256" in miss


def test_a_prediction_that_holds_is_not_and_what_a_row_once_said_does_not_count() -> None:
    near = run(memory=1 / 1.049, speed=1 / 1.19, plan_bytes=1, plan_tokens_per_s=1.0)
    others = run(variant="hf_peft", ran=None), row("rope"), run(ran=None, gpu="NVIDIA L40S")
    assert misses([near, *others]) == []


def test_a_change_of_the_plan_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was predicted well when it was measured."""
    good = run(plan_bytes=planned().bytes, plan_tokens_per_s=planned().tokens_per_s)
    assert misses([good]) == []
    worse = Prediction(2 * planned().bytes, planned().tokens_per_s)
    monkeypatch.setattr(plan_check, "predict", lambda *_: worse)
    assert misses([good]) == ["Made-Up H200, model=toy T=256: memory +100.0% off, at most 5% is allowed"]


def test_policy_bits_packs_and_card_all_matter() -> None:
    found = prediction(run())
    assert found == planned()
    lean = RAN | {"policy": ActivationPolicy.uniform("keep_input", 2, 6).to_json()}
    dense = RAN | {"bits": [16, 16, 16]}
    small = RAN | {"packs": [[128, 96, 16, 2, 2048, 512]]}
    for changed in (run(ran=lean), run(ran=dense), run(ran=small), run(dtype="float32")):
        assert prediction(changed) not in (found, None)
    of_7b = RAN | {"policy": ActivationPolicy.uniform("save_all", 32, 24).to_json()}
    seven = [row("end_to_end", {"model": "7B"}, "step", ran=of_7b, gpu=gpu) for gpu in ("H200", "RTX 3090")]
    fast, slow = map(prediction, seven)
    assert fast is not None and slow is not None
    assert fast.bytes == slow.bytes > 4 * 10**9 and fast.tokens_per_s > 3 * slow.tokens_per_s


@pytest.mark.parametrize(
    ("line", "rows", "backed"),
    [
        ("# Memory: 9.1 GB, measured on an H200", [], False),
        ("# Memory: 9.1 GB, measured on an H200", [{"allocated_bytes": 9_100_000_000}], True),
        ("# Memory: 9.1 GB, measured on an H200", [{"device_bytes": 9_080_000_000, "allocated_bytes": 1}], True),
        ("# Memory: 9.1 GB, measured on an H200", [{"allocated_bytes": 9_500_000_000}], False),
        ("# Memory: 9.1 GB, measured on an H200", [{"case": {"model": "7B"}, "allocated_bytes": 9_100_000_000}], False),
        ("# Memory: 9.1 GB, measured on an H200", [{"ran": None, "allocated_bytes": 9_100_000_000}], False),
        ("# Memory: 9.1 GB", [], False),
        ("# Speed: 2.0 GiB and 1,030 samples/s", [{"allocated_bytes": 2**31, "samples_per_s": 1031.0}], True),
        ("# Speed: 2.0 GiB and 1,030 samples/s", [{"allocated_bytes": 2**31, "samples_per_s": 30.0}], False),
        ("# Hours: 3 on an H200", [{"allocated_bytes": 1}], False),
        ("# It was measured", [{"allocated_bytes": 1}], False),
        ("# Memory: 9.1 GB (the authors' figure; --plan gives ours)", [], True),
        ("# Memory: 9.1 GB, predicted", [], True),
        ("# Memory: as --plan says", [], True),
    ],
)
def test_a_claim_needs_a_row_with_its_figures(
    tmp_path: Path, line: str, rows: list[dict[str, Any]], backed: bool
) -> None:
    recipe = tmp_path / "lavin-13b-lite.yaml"
    recipe.write_text(f"# LaVIN\n{line}\nbits: 4bit  # measured is no claim here\n")
    assert head(recipe) == ["# LaVIN", line] and model_of(recipe) == "13B"
    found = [row("end_to_end", **{"case": {"model": "13B"}, "mode": "step", "ran": RAN, **values}) for values in rows]
    assert (unbacked([recipe], found) == []) == backed
    recipe.write_text(f"# LaVIN\n{line}\nbits: 16bit\n")
    assert (unbacked([recipe], found) == []) == (CLAIM.search(line) is None)
