"""Whether the plan's predictions hold: every measured whole run against what was predicted of it, and every recipe that
says "measured" against the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.rows import Row

MEMORY, SPEED = 0.05, 0.20  # how far a prediction may be off, of what was measured
CLAIM = "measured"  # a recipe's head that says so has a row


def misses(rows: Iterable[Row]) -> list[str]:
    """What was predicted too badly, or not at all, a line each."""
    ours = (row for row in rows if row.bench == "end_to_end" and row.variant == "nibble" and row.failure is None)
    return [miss for row in ours if row.allocated_bytes is not None for miss in _misses(row)]


def _misses(row: Row) -> Iterator[str]:
    pairs = (
        ("memory", row.plan_bytes, row.allocated_bytes, MEMORY),
        ("tokens/s", row.plan_tokens_per_s, row.tokens_per_s, SPEED),
    )
    for what, planned, measured, within in pairs:
        where = f"{row.origin.gpu}, {row.name}: {what}"
        if planned is None or not measured:
            yield f"{where} was not predicted, or not measured"
        elif abs(planned / measured - 1) > within:
            yield f"{where} {planned / measured - 1:+.1%} off, at most {within:.0%} is allowed"


def unbacked(recipes: Iterable[Path], rows: Sequence[Row]) -> list[str]:
    """Recipes whose head claims a figure of ours that no row has.

    The model of a recipe is the size in its name.
    """
    measured = {row.case.get("model") for row in rows if row.bench == "end_to_end" and row.allocated_bytes is not None}
    return [
        f"{recipe.name} claims a measured figure, and no row has its model"
        for recipe in recipes
        if any(CLAIM in line.lower() for line in head(recipe)) and model_of(recipe) not in measured
    ]


def head(recipe: Path) -> list[str]:
    """The comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def model_of(recipe: Path) -> str:
    """The name that rows have for its model: 7B, 13B."""
    return next((part.upper() for part in recipe.stem.split("-") if part[:-1].isdigit()), recipe.stem)
