"""ScienceQA's score table: accuracy by subject, context and grade, in percent.

TXT counts problems with a hint and IMG those with an image, so the two overlap; NO has neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Problem = Mapping[str, Any]

GRADES_1_6 = {f"grade{i}" for i in range(1, 7)}

GROUPS: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda p: p["subject"] == "natural science",
    "SOC": lambda p: p["subject"] == "social science",
    "LAN": lambda p: p["subject"] == "language science",
    "TXT": lambda p: bool(p["hint"]),
    "IMG": lambda p: bool(p["image"]),
    "NO": lambda p: not p["hint"] and not p["image"],
    "G1-6": lambda p: p["grade"] in GRADES_1_6,
    "G7-12": lambda p: p["grade"] not in GRADES_1_6,
    "average": lambda p: True,
}

# The names under which the original writes the same columns.
LAVIN_NAMES = {
    "NAT": "acc_natural", "SOC": "acc_social", "LAN": "acc_language", "TXT": "acc_has_text", "IMG": "acc_has_image",
    "NO": "acc_no_context", "G1-6": "acc_grade_1_6", "G7-12": "acc_grade_7_12", "average": "acc_average",
}  # fmt: skip


def score_table(problems: Sequence[Problem], predictions: Sequence[int]) -> dict[str, float]:
    """Percent correct in each group; NaN for a group without any problem."""
    table = {}
    for group, belongs in GROUPS.items():
        hits = [p["answer"] == guess for p, guess in zip(problems, predictions, strict=True) if belongs(p)]
        table[group] = 100.0 * sum(hits) / len(hits) if hits else math.nan
    return table


def chance(problems: Sequence[Problem]) -> float:
    """The accuracy, in percent, of a uniform guess among each problem's own choices."""
    return 100.0 * sum(1 / len(p["choices"]) for p in problems) / len(problems)


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Named score tables as aligned text, one row each."""
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{group:>9}" for group in GROUPS)]
    for name, table in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{percent(table[group]):>9}" for group in GROUPS))
    return "\n".join(lines)


def percent(score: float) -> str:
    """Two decimals, or a dash where there was nothing to score."""
    return "-" if math.isnan(score) else f"{score:.2f}"


def parse_answer(text: str, num_choices: int, letters: str) -> int | None:
    """The choice named by the first "The answer is X." in a generated answer; None when there is no such choice."""
    found = re.search(r"The answer is ([A-Z])\.", text)
    if found is None or found[1] not in letters[:num_choices]:
        return None
    return letters.index(found[1])


def parse_answer_legacy(prompt_and_text: str, num_choices: int, letters: str) -> int | None:
    """The original's rule: the pattern's dot matches anything, and the prompt is searched too."""
    found = re.search(r"The answer is ([A-Z]).", prompt_and_text)
    if found is None or found[1] not in letters[:num_choices]:
        return None
    return letters.index(found[1])
