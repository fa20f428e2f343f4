from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data.layout import Layout
from engine.data.scienceqa import SPLITS, ScienceQA
from engine.errors import DataError, UsageError

WriteJson = Callable[[str, Any], Path]


def problem(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Which?", "choices": ["cup", "plate"], "answer": 1, "hint": "", "image": None, "task": "closed",
        "grade": "grade2", "subject": "natural science", "topic": "t", "category": "c", "skill": "s", "lecture": "L.",
        "solution": "S.", "split": "train",
    } | changes  # fmt: skip


def written(write_json: WriteJson, problems: dict[str, Any], split: str = "train") -> Path:
    path = write_json("problems.json", problems)
    write_json("pid_splits.json", {name: list(problems) if name == split else [] for name in SPLITS})
    return path.parent


def test_samples_follow_the_split_file(write_json: WriteJson, write_image: Callable[..., Path], layout: Layout) -> None:
    root = written(write_json, {"7": problem(), "3": problem(image="image.png", split="val")}, "minival")
    image = write_image(root / "images" / "val" / "3" / "image.png")
    data = ScienceQA(root, "minival", layout)
    assert len(data) == 2 and data.qids == ["7", "3"]
    assert data.problems[1]["subject"] == "natural science"
    prompt, target = (
        "Question: Which?\nContext: N/A\nOptions: (A) cup (B) plate\nResponse:",
        "The answer is B. BECAUSE: L. S.",
    )
    assert (data.prompt(0), data.target(0)) == (prompt, target)
    assert data.sample(0) == layout.pair("7", prompt, target)
    assert data.sample(1) == layout.pair("3", prompt, target, str(image))
    assert data.prompt_sample(1, "The answer is") == layout.prompt_only("3", prompt + "The answer is", str(image))
    assert "problems.json, problem 3" in data.where(1)


def test_captions_are_needed_only_when_used(write_json: WriteJson, layout: Layout) -> None:
    root = written(write_json, {"1": problem(), "2": problem(hint="See.")})
    assert "Context: N/A" in ScienceQA(root, "train", layout).prompt(0)
    with pytest.raises(DataError, match="cannot be read") as caught:
        ScienceQA(root, "train", layout, use_caption=True)
    assert caught.value.where == str(root / "captions.json")
    elsewhere = write_json("other/mine.json", {"captions": {"1": "a map", "2": "a dog"}})
    data = ScienceQA(root, "train", layout, use_caption=True, captions=elsewhere)
    assert "Context: a map\n" in data.prompt(0) and "Context: See. a dog\n" in data.prompt(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "'answer' must be 0 to 1, got 2"),
        ({"answer": "1"}, "'answer' must be int, got str"),
        ({"answer": True}, "'answer' must be int, got bool"),
        ({"choices": []}, "'choices' must be a list of 1 to 5 texts"),
        ({"choices": ["a", 3]}, "'choices' must be a list of 1 to 5 texts"),
        ({"choices": list("abcdef")}, "'choices' must be a list of 1 to 5 texts"),
        ({"lecture": None}, "'lecture' must be str"),
        ({"question": "\ud800"}, "'question' is not valid Unicode"),
        ({"image": 3}, "'image' must be str or null"),
        ({"image": "image.png"}, "an image is missing"),
        ({"image": "image.png", "split": "../train"}, "'split' must be train, val or test"),
    ],
)
def test_a_broken_problem_is_named(
    write_json: WriteJson, layout: Layout, changes: dict[str, Any], message: str
) -> None:
    root = written(write_json, {"1": problem(), "42": problem(**changes)})
    with pytest.raises(DataError) as caught:
        ScienceQA(root, "train", layout)
    assert message in caught.value.what
    assert caught.value.where == f"{root / 'problems.json'}, problem 42"


def test_missing_keys_problems_files_and_splits(write_json: WriteJson, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        ScienceQA(tmp_path, "train", layout)
    assert "--dataset.root" in caught.value.do
    incomplete = problem()
    del incomplete["hint"]
    root = written(write_json, {"1": incomplete})
    with pytest.raises(DataError, match="key 'hint' is missing"):
        ScienceQA(root, "train", layout)
    with pytest.raises(DataError, match="split 'val' is empty"):
        ScienceQA(root, "val", layout)
    with pytest.raises(UsageError, match="unknown split 'dev'"):
        ScienceQA(root, "dev", layout)
    write_json("pid_splits.json", {"train": ["1", "99"]})
    with pytest.raises(DataError, match="key '99' is missing"):
        ScienceQA(root, "train", layout)
    write_json("problems.json", '{"1": {"question": "Wh')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        ScienceQA(root, "train", layout)
    assert "line 1" in caught.value.why


def test_an_image_linked_from_outside_is_refused(
    write_json: WriteJson, write_image: Callable[..., Path], layout: Layout
) -> None:
    root = written(write_json, {"1": problem(image="image.png")})
    outside = write_image(root / "outside.png")
    link = root / "images" / "train" / "1" / "image.png"
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(DataError, match="outside of its folder"):
        ScienceQA(root, "train", layout)
