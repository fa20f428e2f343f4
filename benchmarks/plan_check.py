"""Whether the plan's predictions hold: every measured whole run against what today's plan predicts for it, and every
recipe that claims a measured figure against the rows.

A row says what ran (`Row.ran`): packs, bits, what layers kept, copies of weights. That is planned anew, so that a
change of the plan that breaks a prediction is seen, and so is one of the code that the plan counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.end_to_end import SHAPES
from benchmarks.engine_setting import Prediction, predict
from benchmarks.rows import Row
from engine.plan.cards import card_named
from models.vlm import VLMConfig

MEMORY, SPEED = 0.05, 0.20  # how far a prediction may be off, of what was measured
# Lines of a recipe's head that claim a figure of ours: those that say so, and needs that are nobody else's.
CLAIM = re.compile(r"measured|^# *(Memory|Speed|Hours):(?!.*(author|predicted)).*\d", re.IGNORECASE)
ROUNDED = 0.02  # how far such a figure may be off
FIGURE = re.compile(r"([\d,]+(?:\.\d+)?) (GB|GiB|samples/s|tokens/s)")


def misses(rows: Iterable[Row]) -> list[str]:
    """What is predicted too badly, or cannot be predicted, a line each. A card that is not in the plan's table has no
    prediction, and no row of it is looked at."""
    return [miss for row in rows if _is_ours(row) and card_named(row.origin.gpu) for miss in _misses(row)]


def _is_ours(row: Row) -> bool:
    return (row.bench, row.variant, row.failure) == ("end_to_end", "nibble", None) and row.allocated_bytes is not None


def _misses(row: Row) -> Iterator[str]:
    where = f"{row.origin.gpu}, {row.name}:"
    found = prediction(row)
    if found is None:
        yield f"{where} the row does not say what ran"
        return
    pairs = (
        ("memory", found.bytes, row.allocated_bytes, MEMORY),
        ("tokens/s", found.tokens_per_s, row.tokens_per_s, SPEED),
    )
    for what, planned, measured, within in pairs:
        if not measured:
            yield f"{where} {what} was not measured"
        elif abs(planned / measured - 1) > within:
            yield f"{where} {what} {planned / measured - 1:+.1%} off, at most {within:.0%} is allowed"


def prediction(row: Row) -> Prediction | None:
    """For what ran, on the card of the row. None where the row does not tell."""
    card = card_named(row.origin.gpu)
    if row.ran is None or card is None:
        return None
    shape = SHAPES[row.case["model"]]
    return predict(VLMConfig(language=shape.language, vision=shape.tower), row.ran, getattr(torch, row.dtype), card)


def unbacked(recipes: Iterable[Path], rows: Sequence[Row]) -> list[str]:
    """Lines of recipes' heads that claim a figure of ours that no row has: one of the model (the size in the recipe's
    name) with the recipe's bits."""
    ours = [row for row in rows if _is_ours(row)]
    return [
        f"{recipe.name}: no row has what it says was measured: {line.lstrip('# ')}"
        for recipe in recipes
        for line in head(recipe)
        if CLAIM.search(line) and not _backed(line, [row for row in ours if _is_of(row, recipe)])
    ]


def _backed(line: str, rows: Sequence[Row]) -> bool:
    """Whether there are figures in it, and a row has them all."""
    claims = [(float(number.replace(",", "")), unit) for number, unit in FIGURE.findall(line)]
    return bool(claims) and any(
        all(any(abs(value / claim - 1) <= ROUNDED for value in _values(row, unit)) for claim, unit in claims)
        for row in rows
    )


def _values(row: Row, unit: str) -> list[float]:
    """What a row has in this unit."""
    size = {"GB": 10**9, "GiB": 2**30}.get(unit)
    if size is None:
        found = [row.samples_per_s if unit == "samples/s" else row.tokens_per_s]
        return [value for value in found if value is not None]
    return [value / size for value in (row.allocated_bytes, row.device_bytes) if value is not None]


def _is_of(row: Row, recipe: Path) -> bool:
    bits = re.search(r"^bits: *(\d+)bit", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    of_row = None if row.ran is None else row.ran["bits"][0]
    return row.case.get("model") == model_of(recipe) and bits is not None and int(bits[1]) == of_row


def head(recipe: Path) -> list[str]:
    """The comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def model_of(recipe: Path) -> str:
    """The name that rows have for its model: 7B, 13B."""
    return next((part.upper() for part in recipe.stem.split("-") if part[:-1].isdigit()), recipe.stem)
