"""Problems in ScienceQA's layout, half with a picture, and the other problems that the base model learns from.

Every problem has a fingerprint (its picture, or its words) that falls in one of sixteen buckets; the base model,
train, val and test own different buckets. So no test problem and no picture of one is in any training data.
"""

from __future__ import annotations

from random import Random

from engine.demo.draft import Draft
from engine.demo.lessons import lesson
from engine.demo.picture_questions import PICTURE_QUESTIONS
from engine.demo.text_questions import TEXT_QUESTIONS

BUCKETS = {"base": range(0, 8), "train": range(8, 12), "val": range(12, 14), "test": range(14, 16)}
TRIES = 2000  # draws for one new problem before we say that a kind is exhausted


def drafts(owner: str, seed: int, count: int) -> list[Draft]:
    """Draw `count` different problems from the buckets of one owner: base, train, val or test."""
    rng = Random(f"{owner}/{seed}")
    seen: set[tuple[bytes, tuple[str, ...]]] = set()
    found: list[Draft] = []
    for number in range(count):
        kinds = PICTURE_QUESTIONS if number % 2 == 0 else TEXT_QUESTIONS
        question = kinds[number // 2 % len(kinds)]
        for _ in range(TRIES):
            draft = question(rng)
            fingerprint = draft.fingerprint()
            mark = (fingerprint, draft.choices)
            if fingerprint[0] % 16 in BUCKETS[owner] and mark not in seen:
                break
        else:
            raise ValueError(f"{owner} asks for {count} problems: there is no new one of kind {question.__name__!r} left")
        seen.add(mark)
        found.append(draft)
    return found


def base_rows(seed: int, count: int, told: float = 0.3) -> list[Draft]:
    rng = Random(f"lessons/{seed}")
    return [lesson(draft, rng, told) for draft in drafts("base", seed, count)]
