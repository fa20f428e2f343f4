"""The plan against benchmarks/results, and that the comparison can fail. No figure in here was ever measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_check import head, misses, model_of, unbacked
from benchmarks.rows import Row, read
from tests.benchmarks.made_up import row

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def recorded() -> list[Row]:
    return read(ROOT / "benchmarks/results")


def run(**values: Any) -> Row:
    figures = {"allocated_bytes": 1000, "plan_bytes": 1000, "tokens_per_s": 100.0, "plan_tokens_per_s": 100.0}
    return row("end_to_end", {"model": "7B", "T": 2048}, "step", **figures | values)


def test_what_was_measured_was_predicted() -> None:
    assert misses(recorded()) == []


def test_recipes_claim_nothing_without_a_row() -> None:
    assert RECIPES
    assert unbacked(RECIPES, recorded()) == []


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"plan_bytes": 1051}, "memory +5.1% off"),
        ({"plan_bytes": 949}, "memory -5.1% off"),
        ({"plan_tokens_per_s": 121.0}, "tokens/s +21.0% off"),
        ({"plan_tokens_per_s": 79.0}, "tokens/s -21.0% off"),
        ({"plan_bytes": None}, "memory was not predicted"),
        ({"plan_tokens_per_s": None}, "tokens/s was not predicted"),
    ],
)
def test_a_prediction_that_is_off_is_named(values: dict[str, Any], what: str) -> None:
    (miss,) = misses([run(), run(**values)])
    assert what in miss and "Made-Up H200, model=7B T=2048" in miss


def test_a_prediction_that_holds_is_not() -> None:
    near = run(plan_bytes=1049, plan_tokens_per_s=119.0)
    assert misses([near, run(variant="hf_peft", plan_bytes=None), row("rope")]) == []


def test_a_claim_needs_a_row_of_its_model(tmp_path: Path) -> None:
    claims = tmp_path / "lavin-13b-lite.yaml"
    claims.write_text("# LaVIN\n# Memory: 9.1 GB, measured on an H200\nbits: 4bit\n")
    silent = tmp_path / "lavin-7b.yaml"
    silent.write_text("# LaVIN\nbits: 4bit  # measured is no claim here\n")
    assert head(claims)[1].startswith("# Memory") and model_of(claims) == "13B"
    assert len(unbacked([claims, silent], [])) == len(unbacked([claims, silent], [run()])) == 1
    thirteen = row("end_to_end", {"model": "13B", "T": 2048}, "step", allocated_bytes=1)
    assert unbacked([claims, silent], [thirteen]) == []
