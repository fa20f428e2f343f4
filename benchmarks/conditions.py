"""What it takes to meet a goal: conditions on rows, and the verdict on them.

A goal is met when all its conditions hold on one card; a condition that fails makes it missed, and while none fails and
a row is missing, or something needs what no row can tell yet, it is not measured. A condition holds for each of its
cases; the figure shown is that of the worst one (or, where the goal says so, the geometric mean).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.rows import Row

Status = Literal["met", "missed", "not_measured"]
OURS = "nibble"


@dataclass(frozen=True, slots=True)
class Condition:
    """A figure of each case and its bound.

    The figure is `field` of our row. With a peer it is a ratio: the peer's to ours where more is asked for (times:
    how much faster we are), ours to the peer's where a limit is set.
    """

    label: str
    bench: str
    mode: str
    cases: tuple[str, ...]
    sense: Literal[">=", "<="]
    bound: float
    field: str = "ms"
    peer: str = ""
    ours: str = OURS
    geomean: bool = False
    unit: float = 1.0  # the field's value is divided by it

    @property
    def text(self) -> str:
        return f"{self.label} {self.sense} {self.bound:g}"

    def holds(self, figure: float) -> bool:
        return figure >= self.bound if self.sense == ">=" else figure <= self.bound

    def figure(self, ours: Row, peer: Row | None) -> float:
        mine = getattr(ours, self.field)
        if peer is None:
            return float(mine) / self.unit
        other = getattr(peer, self.field)
        top, bottom = (other, mine) if self.sense == ">=" else (mine, other)
        return float(top) / float(bottom) if bottom else math.inf if top else 1.0


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the goals table. `also`: targets that no row can tell yet, and `needs`: what it takes to tell them;
    while there are any, the goal cannot be met."""

    id: str
    text: str
    conditions: tuple[Condition, ...] = ()
    also: str = ""
    needs: str = ""

    @property
    def target(self) -> str:
        return "; ".join([*(condition.text for condition in self.conditions), *([self.also] if self.also else [])])


@dataclass(slots=True)
class Verdict:
    goal: Goal
    status: Status
    measured: str | None  # figures, and why others are missing
    rows: list[Row] = field(default_factory=list)

    def flat(self) -> dict[str, Any]:
        return {
            "id": self.goal.id, "text": self.goal.text, "target": self.goal.target, "measured": self.measured,
            "status": self.status, "rows": [row.flat() for row in self.rows],
        }  # fmt: skip


class Found:
    """The rows of one card by what they measure."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows: Mapping[tuple[str, str, str, str], Row] = {
            (row.bench, row.name, row.mode or "", row.variant): row for row in rows
        }

    def get(self, bench: str, case: str, mode: str, variant: str) -> Row | None:
        """The row, that of a failure if the variant did not get as far as this mode."""
        return self.rows.get((bench, case, mode, variant)) or self.rows.get((bench, case, "", variant))


def judge(goal: Goal, rows: Sequence[Row]) -> Verdict:
    """`rows`: those of one card that count (rows.latest)."""
    found = Found(rows)
    states: list[bool | None] = []
    texts: list[str] = []
    used: dict[int, Row] = {}
    for condition in goal.conditions:
        holds, text, of_condition = _judge_condition(condition, found)
        states.append(holds)
        texts.append(text)
        used |= {id(row): row for row in of_condition}
    if goal.needs:
        states.append(None)
        texts.append(f"needs {goal.needs}")
    status: Status = "missed" if False in states else "not_measured" if None in states else "met"
    return Verdict(goal, status, "; ".join(texts) if used else None, list(used.values()))


def _judge_condition(condition: Condition, found: Found) -> tuple[bool | None, str, list[Row]]:
    """Whether it holds (None: not known), what was measured, and the rows that say so."""
    figures: list[tuple[float, str]] = []
    rows: list[Row] = []
    missing = []
    for case in condition.cases:
        names = [condition.ours, *([condition.peer] if condition.peer else [])]
        of_case = [found.get(condition.bench, case, condition.mode, name) for name in names]
        rows += [row for row in of_case if row is not None]
        if of_case[0] is not None and of_case[0].failure is not None:
            return False, f"{condition.label}: {condition.ours} failed at {case} ({of_case[0].failure})", rows
        for name, row in zip(names, of_case, strict=True):
            if row is None or row.failure is not None or getattr(row, condition.field) is None:
                missing.append(f"{name} at {case}" + (f" ({row.failure})" if row and row.failure else ""))
                break
        else:
            ours, *peers = [row for row in of_case if row is not None]
            figures.append((condition.figure(ours, peers[0] if peers else None), case))
    text, holds = _summary(condition, figures)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        text = "; ".join([*([text] if figures else []), f"{condition.label}: no row of {missing[0]}{more}"])
        holds = False if figures and not holds and not condition.geomean else None
    return holds, text, rows


def _summary(condition: Condition, figures: list[tuple[float, str]]) -> tuple[str, bool | None]:
    """The figure to be shown, and whether the bound holds."""
    if not figures:
        return "", None
    if condition.geomean:
        mean = statistics.geometric_mean([figure for figure, _ in figures])
        return f"{condition.label} {mean:.3g} (geometric mean of {len(figures)})", condition.holds(mean)
    worst = min(figures) if condition.sense == ">=" else max(figures)
    return f"{condition.label} {worst[0]:.3g} ({worst[1]})", condition.holds(worst[0])
