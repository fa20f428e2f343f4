"""The demo's problems: ScienceQA's layout, balanced answers, and nothing shared with what the base learnt."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from engine.data.layout import Layout
from engine.data.scienceqa import ScienceQA
from engine.data.tokenizer import open_tokenizer
from engine.demo.lessons import base_lessons
from engine.demo.problems import drafts, write_demo_data
from tests.world import make_tokenizer

COUNTS = {"num_train": 260, "num_val": 26, "num_test": 130}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    write_demo_data(root, **COUNTS)
    return root


def test_the_engine_reads_them_as_scienceqa(data: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.model")
    layout = Layout(open_tokenizer(tmp_path / "tokenizer.model"))
    for split, count in (("train", 260), ("val", 26), ("test", 130), ("trainval", 286), ("minitest", 13)):
        found = ScienceQA(data, split, layout, use_caption=True)
        assert len(found) == count
        assert sum(found.sample(i).image is not None for i in range(count)) == (count + 1) // 2


def test_the_same_seed_gives_the_same_files(data: Path, tmp_path: Path) -> None:
    write_demo_data(tmp_path, **COUNTS)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((data / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_all_kinds_of_problems_are_there(data: Path) -> None:
    problems = json.loads((data / "problems.json").read_text()).values()
    assert {p["subject"] for p in problems} == {"natural science", "social science", "language science"}
    assert {p["grade"] for p in problems} == {f"grade{i}" for i in range(1, 13)}
    assert {len(p["choices"]) for p in problems} == {2, 3, 4, 5}
    assert all(p["lecture"] and p["solution"] for p in problems)
    hints = [bool(p["hint"]) for p in problems if p["image"] is None]
    assert len(hints) == 130 + 13 + 65 and hints.count(False) == 33 + 4 + 17  # one in four of each split


def test_question_and_choices_say_nothing_about_the_answer() -> None:
    """Among problems that look alike without their picture, every choice is the answer about equally often."""
    answers: dict[tuple[object, ...], Counter[int]] = defaultdict(Counter)
    for draft in drafts("base", 1, 6000, repeat=True):
        if draft.scene is not None:
            answers[draft.kind.skill, draft.choices][draft.answer] += 1
    guessed = sum(max(counter.values()) for counter in answers.values())
    by_chance = sum(counter.total() / len(choices) for (_, choices), counter in answers.items())
    total = sum(counter.total() for counter in answers.values())
    assert total == 3000
    assert guessed / total < by_chance / total + 0.06  # the best rule without the picture, fitted to these problems


def test_nothing_is_shared_between_the_base_and_the_splits() -> None:
    """Neither a picture nor the words of a text-only problem."""
    owned = {
        "base": {draft.fingerprint() for draft in drafts("base", 0, 3000, repeat=True)},
        "train": {draft.fingerprint() for draft in drafts("train", 0, 1500)},
        "val": {draft.fingerprint() for draft in drafts("val", 0, 200)},
        "test": {draft.fingerprint() for draft in drafts("test", 0, 600)},
    }
    for first in owned:
        for second in owned:
            assert first == second or not owned[first] & owned[second]
    pictures = {draft.scene for draft in base_lessons(0, 3000) if draft.scene is not None}
    assert not pictures & {draft.scene for draft in drafts("test", 0, 600)}


def test_an_exhausted_kind_is_an_error_and_not_a_repetition() -> None:
    with pytest.raises(ValueError, match="has no new one left"):
        drafts("test", 0, 100_000)
