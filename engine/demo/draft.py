"""A problem before it has a number and a file: what every kind of question returns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from engine.demo.scenes import Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What all problems of one kind share."""

    subject: str
    topic: str
    category: str
    skill: str
    grades: tuple[int, int]  # first and last grade
    lecture: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One problem. `scene` is None for a text-only problem."""

    kind: Kind
    question: str
    choices: tuple[str, ...]
    answer: int
    solution: str
    hint: str = ""
    scene: Scene | None = None

    def fingerprint(self) -> bytes:
        """Digest of what makes the problem new: its picture, or its words whatever the order of the choices."""
        content = self.scene if self.scene is not None else (self.question, self.hint, sorted(self.choices))
        return hashlib.sha256(repr(content).encode()).digest()


def choose(rng: Random, pool: Sequence[str], smallest: int, largest: int) -> tuple[tuple[str, ...], int]:
    """The first few words of the pool as choices, and one of them as the answer.

    Every choice is the answer with the same probability, so the list says nothing about it. The words always stand in
    the pool's order: a network of this size learns to read a letter off what it sees long before it learns to look a
    word up in a list.
    """
    choices = tuple(pool[: rng.randint(smallest, largest)])
    return choices, rng.randrange(len(choices))
