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
    """Draw choices first and the answer among them last.

    Every choice of the list is then the answer with the same probability, so that neither a place in the list
    nor a word nor the company it keeps says anything about the answer.
    """
    choices = tuple(rng.sample(list(pool), rng.randint(smallest, min(largest, len(pool)))))
    return choices, rng.randrange(len(choices))
