"""What only the base model gets: problems with less to do at a time, so that a network of this size can learn them.

A letter alone teaches it slowly to see or to read. Solutions that describe the picture teach to see, and a context that
tells the answer teaches what its letter is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from engine.demo.draft import Draft
from engine.demo.problems import drafts, write_scienceqa
from engine.demo.scenes import SIDE, Scene

TOLD = 0.1  # share of lessons whose context tells the answer
EXPLAINED = 0.3  # share of lessons with a lecture, a solution and a description


def describe(scene: Scene) -> str:
    """One phrase for each mark in reading order, or for each bar from left to right."""
    if scene.bars:
        sizes = ["tall" if bar.height > 60 else "short" if bar.height < 20 else "middle" for bar in scene.bars]
        return ", ".join(f"{size} {bar.color} bar" for size, bar in zip(sizes, scene.bars, strict=True)) + "."
    words = []
    for mark in sorted(scene.marks, key=lambda m: (3 * m.y // SIDE, m.x)):
        size = "large " if mark.radius >= 16 else "small " if mark.radius <= 9 else ""
        words.append(f"{size}{mark.color} {mark.shape} {_where(mark.x, mark.y)}")
    return ", ".join(words) + "."


def _where(x: int, y: int) -> str:
    """Compass words of the ninth of the picture that holds a point."""
    rows, columns = ("north ", "", "south "), ("west", "", "east")
    return (rows[min(3 * y // SIDE, 2)] + columns[min(3 * x // SIDE, 2)]).strip() or "center"


def lesson(draft: Draft, rng: Random) -> Draft:
    """Turn a problem of the base's own into a lesson: maybe told in the context, maybe explained, maybe neither."""
    hint = f"{draft.hint} {draft.solution}".strip() if rng.random() < TOLD else draft.hint
    if rng.random() >= EXPLAINED:
        return replace(draft, kind=replace(draft.kind, lecture=""), hint=hint, solution="")
    seen = "" if draft.scene is None else f" {describe(draft.scene)}"
    return replace(draft, hint=hint, solution=draft.solution + seen)


def base_lessons(seed: int, count: int) -> list[Draft]:
    """Lessons on every kind of question; a problem may come again as another lesson."""
    rng = Random(f"lessons/{seed}")
    return [lesson(draft, rng) for draft in drafts("base", seed, count, repeat=True, pictures=2 / 3)]


def write_lessons(root: Path, rows: Sequence[Draft], seed: int = 0) -> None:
    """Write lessons as the train split of a folder in ScienceQA's layout."""
    write_scienceqa(root, {"train": rows}, seed)
