"""Problems in ScienceQA's layout, half with a picture, drawn so that no two owners can hold the same one.

Every problem has a fingerprint (its picture, or its words) that falls in one of sixteen buckets; the base model,
train, val and test own different buckets. So no test problem and no picture of one is in any training data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from engine.demo.draft import Draft
from engine.demo.picture_questions import PICTURE_QUESTIONS
from engine.demo.scenes import Scene, draw
from engine.demo.text_questions import TEXT_QUESTIONS

BUCKETS = {"base": range(0, 8), "train": range(8, 12), "val": range(12, 14), "test": range(14, 16)}
TRIES = 2000  # draws for one new problem before a kind counts as exhausted
FIRST_QID = {"train": 1, "val": 100_001, "test": 200_001}


def drafts(owner: str, seed: int, count: int, *, pictures: float = 0.5, repeat: bool = False) -> list[Draft]:
    """Draw `count` problems from the buckets of one owner: base, train, val or test.

    The share `pictures` of them has a picture; every kind comes as often as the others of its half. All differ, unless
    `repeat`.

    Raises:
        ValueError: an unknown owner, or more problems than there are.
    """
    if owner not in BUCKETS:
        raise ValueError(f"unknown owner {owner!r}: accepted are {', '.join(BUCKETS)}")
    rng = Random(f"{owner}/{seed}")
    seen: set[tuple[bytes, tuple[str, ...]]] = set()
    found: list[Draft] = []
    drawn = [0, 0]  # text-only, with a picture
    for number in range(count):
        shown = int(number * pictures + 1) > drawn[1]
        kinds = PICTURE_QUESTIONS if shown else TEXT_QUESTIONS
        question = kinds[drawn[shown] % len(kinds)]
        drawn[shown] += 1
        for _ in range(TRIES):
            draft = question(rng)
            fingerprint = draft.fingerprint()
            mark = (fingerprint, draft.choices)
            if fingerprint[0] % 16 in BUCKETS[owner] and (repeat or mark not in seen):
                break
        else:
            raise ValueError(f"{owner} asks for {count} problems, but {question.__name__!r} has no new one left")
        seen.add(mark)
        found.append(draft)
    return found


def write_demo_data(
    root: Path, seed: int = 0, num_train: int = 4000, num_val: int = 200, num_test: int = 600
) -> None:  # fmt: skip
    """Write the demo's problems to `root` in ScienceQA's layout; the same arguments give the same files."""
    counts = {"train": num_train, "val": num_val, "test": num_test}
    splits = {split: drafts(split, seed, count) for split, count in counts.items()}
    write_scienceqa(root, {split: _some_without_hint(found) for split, found in splits.items()}, seed)


def _some_without_hint(found: Sequence[Draft]) -> list[Draft]:
    """Every fourth text-only problem tells in its question what the others tell in their hint."""
    told = [draft for draft in found if draft.hint]
    moved = {id(draft) for draft in told[::4]}
    return [
        replace(draft, question=f"{draft.hint} {draft.question}", hint="") if id(draft) in moved else draft
        for draft in found
    ]


def write_scienceqa(root: Path, splits: Mapping[str, Sequence[Draft]], seed: int) -> None:
    """Write drafts as problems.json, pid_splits.json, captions.json and images/{split}/{qid}/image.png under `root`."""
    grades = Random(f"grades/{seed}")
    problems: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    qids: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split, found in splits.items():
        for number, draft in enumerate(found):
            qid = str(FIRST_QID[split] + number)
            qids[split].append(qid)
            problems[qid] = as_problem(draft, split, grades.randint(*draft.kind.grades))
            if draft.scene is not None:
                folder = root / "images" / split / qid
                folder.mkdir(parents=True)
                draw(draft.scene).save(folder / "image.png")
                captions[qid] = _caption(draft.scene)
    named = {**qids, "trainval": qids["train"] + qids["val"]}
    named |= {f"mini{split}": found[: max(len(found) // 10, 1)] for split, found in qids.items()}
    _write(root / "problems.json", problems)
    _write(root / "pid_splits.json", named)
    _write(root / "captions.json", {"model": "written by hand", "captions": captions})


def as_problem(draft: Draft, split: str, grade: int) -> dict[str, Any]:
    """The entry of problems.json."""
    kind = draft.kind
    return {
        "question": draft.question, "choices": list(draft.choices), "answer": draft.answer, "hint": draft.hint,
        "image": None if draft.scene is None else "image.png", "task": "closed choice", "grade": f"grade{grade}",
        "subject": kind.subject, "topic": kind.topic, "category": kind.category, "skill": kind.skill,
        "lecture": kind.lecture, "solution": draft.solution, "split": split,
    }  # fmt: skip


def _caption(scene: Scene) -> str:
    """What kind of picture it is; never what an answer could be read from."""
    if scene.bars:
        return "a bar chart"
    return "a map" if scene.background == "land" else "a drawing of shapes"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
