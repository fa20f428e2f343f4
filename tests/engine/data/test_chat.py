from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data.chat import ChatData
from engine.data.layout import Layout
from engine.errors import DataError

WriteJson = Callable[[str, Any], Path]
INSTRUCTION = "Instruction: What is on the table?\nResponse:"


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "instruction": INSTRUCTION, "answer": "A cup.", "image": None, "options": None, "image_source": None,
        "qid": "a_0",
    } | changes  # fmt: skip


def test_entries_and_both_image_sources(
    write_json: WriteJson, write_image: Callable[..., Path], layout: Layout, tmp_path: Path
) -> None:
    coco = write_image(tmp_path / "images/train2014/COCO_train2014_17.jpg")
    sqa = write_image(tmp_path / "images/train/5/image.png")
    path = write_json(
        "all_data.json",
        {"all": [entry(), entry(image="17.jpg", image_source="mscoco"), entry(image="x", image_source="sqa", qid="5")]},
    )
    data = ChatData(path, tmp_path, layout)
    assert len(data) == 3
    assert data.sample(0) == layout.pair("a_0", INSTRUCTION, "A cup.")
    assert data.sample(1).image == str(coco) and data.sample(2).image == str(sqa)
    assert data.where(2) == f"{path}, entry 3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, "'answer' must be str"),
        ({"image": "1.jpg", "image_source": "web"}, "must be mscoco or sqa, got 'web'"),
        ({"image": "1.jpg"}, "'image_source' must be str"),
        ({"image": "1.jpg", "image_source": "mscoco"}, "an image is missing"),
        ({"image": "../../../../x.png", "image_source": "mscoco"}, "outside of its folder"),
    ],
)
def test_a_broken_entry_is_named(
    write_json: WriteJson, layout: Layout, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_json("all_data.json", {"all": [entry(), entry(**changes)]})
    with pytest.raises(DataError) as caught:
        ChatData(path, tmp_path, layout)
    assert message in caught.value.what
    assert caught.value.where == f"{path}, entry 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "an entry must be a mapping"),
        ({}, "key 'all' is missing"),
        ({"all": {}}, "'all' must be list"),
        ({"all": []}, "no entries"),
    ],
)
def test_a_file_of_another_shape(
    write_json: WriteJson, layout: Layout, tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ChatData(write_json("all_data.json", content), tmp_path, layout)
