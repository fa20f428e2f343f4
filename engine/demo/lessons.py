"""What only the base model gets: problems with the picture described, or with the answer's sentence in the context.

A letter alone teaches a network of this size neither to see nor to connect a sentence with the letter of a choice.
Descriptions teach it to see; sentences in the context teach it to read the list of choices.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from engine.demo.draft import Draft, Kind, choose
from engine.demo.picture_questions import NUMBERS, PLACES, RELATIONS
from engine.demo.scenes import COLORS, SHAPES, SIDE, Scene
from engine.demo.text_questions import DRINKS, GOODS, NAMES, TOWNS, WORDS


def _where(x: int, y: int) -> str:
    """Compass words of the ninth of the picture that holds a point."""
    rows, columns = ("north ", "", "south "), ("west", "", "east")
    return (rows[min(3 * y // SIDE, 2)] + columns[min(3 * x // SIDE, 2)]).strip() or "center"


def describe(scene: Scene) -> str:
    """One phrase for each mark in reading order, or for each bar from left to right."""
    if scene.bars:
        words = [f"{'tall' if b.height > 60 else 'short' if b.height < 20 else 'middle'} {b.color} bar" for b in scene.bars]
        return ", ".join(words) + "."
    marks = sorted(scene.marks, key=lambda m: (3 * m.y // SIDE, m.x))
    words = [
        f"{'large ' if m.radius >= 16 else 'small ' if m.radius <= 9 else ''}{m.color} {m.shape} {_where(m.x, m.y)}"
        for m in marks
    ]
    return ", ".join(words) + "."


def name_choices(draft: Draft, rng: Random) -> str:
    """Say for every choice, in another order, which letter it has."""
    names = [f"{choice} is {letter}" for letter, choice in zip("ABCDE", draft.choices, strict=False)]
    rng.shuffle(names)
    return ", ".join(names) + "."


def lesson(draft: Draft, rng: Random, told: float) -> Draft:
    """Turn a problem into a lesson: with probability `told` the context tells what the answer follows from."""
    solution = draft.solution
    hint = draft.hint
    if draft.scene is not None:
        solution = f"{draft.solution} {describe(draft.scene)}"
        if rng.random() < told:
            hint = draft.solution if rng.random() < 0.5 else describe(draft.scene)
    elif rng.random() < told:
        hint = f"{draft.hint} {draft.solution}".strip()
    if rng.random() < 0.7:
        solution = f"{solution} {name_choices(draft, rng)}"
    return replace(draft, hint=hint, solution=solution)


NAMING = Kind(
    subject="language science", topic="reference skills", category="Choices", skill="Find the letter of a choice",
    grades=(1, 1), lecture="",
)
VOCABULARY = (
    *COLORS, *SHAPES, *NUMBERS, *PLACES, *RELATIONS, *NAMES, *TOWNS, *GOODS, *DRINKS, *WORDS,
)  # fmt: skip


def naming(rng: Random) -> Draft:
    """Ask for the letter of a word. Half of the rows use eight words, a quarter 32: with few words it is learnt first."""
    pool = VOCABULARY[: rng.choice((8, 8, 32, len(VOCABULARY)))]
    choices, answer = choose(rng, pool, 2, 5)
    return Draft(kind=NAMING, question=f"Which choice is {choices[answer]}?", choices=choices, answer=answer, solution="")
