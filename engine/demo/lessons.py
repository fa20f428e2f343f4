"""What only the base model gets: problems with less to do at a time, so that a network of this size can learn them.

A letter alone teaches it neither to see nor to connect a word with the letter of a choice. `naming` teaches letters,
a context that tells the answer teaches to read, and solutions that describe the picture teach to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from engine.demo.draft import Draft, Kind, choose
from engine.demo.picture_questions import NUMBERS, PLACES, RELATIONS
from engine.demo.problems import drafts, write_scienceqa
from engine.demo.scenes import COLORS, SHAPES, SIDE, Scene
from engine.demo.text_questions import DRINKS, GOODS, NAMES, TOWNS, WORDS

NAMING = Kind(
    subject="language science", topic="reference skills", category="Choices", skill="Find the letter of a choice",
    grades=(1, 1), lecture="",
)  # fmt: skip
QUIET = {"lecture": ""}
VOCABULARY = (*COLORS, *SHAPES, *NUMBERS, *PLACES, *RELATIONS, *NAMES, *TOWNS, *GOODS, *DRINKS, *WORDS)

TOLD = 0.3  # share of lessons whose context tells what the answer follows from
EXPLAINED = 0.4  # share of lessons with a lecture, a solution and a description
NAMED = 0.15  # share of lessons that ask for the letter of a word


def naming(rng: Random) -> Draft:
    """Ask for the letter of a word. Half of the rows use eight words: with few words it is learnt first."""
    choices, answer = choose(rng, VOCABULARY[: rng.choice((8, 8, 32, len(VOCABULARY)))], 2, 5)
    question = f"Which choice is {choices[answer]}?"
    return Draft(kind=NAMING, question=question, choices=choices, answer=answer, solution="")


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
    hint = draft.hint
    if rng.random() < TOLD:
        if draft.scene is None:
            hint = f"{draft.hint} {draft.solution}".strip()
        else:
            hint = draft.solution if rng.random() < 0.5 else describe(draft.scene)
    if rng.random() >= EXPLAINED:
        return replace(draft, kind=replace(draft.kind, **QUIET), hint=hint, solution="")
    seen = "" if draft.scene is None else f" {describe(draft.scene)}"
    return replace(draft, hint=hint, solution=draft.solution + seen)


def naming_rows(seed: int, count: int) -> list[Draft]:
    """The first stage: letters only, no pictures."""
    rng = Random(f"naming/{seed}")
    return [naming(rng) for _ in range(count)]


def base_rows(seed: int, count: int) -> list[Draft]:
    """The second stage: lessons on every kind of question, and some more letters."""
    rng = Random(f"lessons/{seed}")
    return [naming(rng) if rng.random() < NAMED else lesson(draft, rng) for draft in drafts("base", seed, count)]


def write_lessons(root: Path, rows: Sequence[Draft], seed: int = 0) -> None:
    """Write lessons as the train split of a folder in ScienceQA's layout."""
    write_scienceqa(root, {"train": rows}, seed)
