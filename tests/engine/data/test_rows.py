from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.layout import Layout
from engine.data.rows import Rows, parse_row
from engine.data.sample import IGNORE
from engine.errors import DataError

WriteJson = Callable[[str, Any], Path]


def row(*values: str, **keys: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    return {"id": "r", "conversations": [{"from": roles[n % 2], "value": v} for n, v in enumerate(values)]} | keys


def said(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "a"} for role in roles]}


def test_a_conversation_is_one_sample(write_json: WriteJson, write_image: Callable[..., Path], layout: Layout) -> None:
    content = [row("hi", "hello"), row("<image>\nWhat is it?", "A cup.", "Red?", "Yes.", image="a/b.png", id=7)]
    path = write_json("my.json", content)
    image = write_image(path.parent / "pictures" / "a" / "b.png")
    data = Rows(path, str(path.parent / "pictures"), layout)
    assert len(data) == 2
    assert data.sample(0) == layout.pair("r", "Instruction: hi\nResponse:", "hello")
    turns = [("Instruction: What is it?\nResponse:", "A cup."), ("Instruction: Red?\nResponse:", "Yes.")]
    assert data.sample(1) == layout.turns("7", turns, str(image))
    targets = [label for label in data.sample(1).labels if label != IGNORE]
    assert layout.tokenizer.decode(targets) == "A cup.Yes." and targets.count(layout.tokenizer.eos_id) == 2


def test_json_and_jsonl_give_the_same_samples(write_json: WriteJson, layout: Layout) -> None:
    content = [row("a", "b\u2028c"), row("d", "e", id=None)]
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in content)
    from_list = Rows(write_json("my.json", content), "", layout)
    from_lines = Rows(write_json("my.jsonl", "\n" + lines + "\n\n"), "", layout)
    assert len(from_lines) == 2
    assert from_list.sample(0) == from_lines.sample(0)
    assert from_list.where(1).endswith("my.json, row 2") and from_lines.where(1).endswith("my.jsonl, line 3")
    assert from_list.sample(1).id == from_list.where(1)  # a row without an id is called by its place


@pytest.mark.parametrize(
    ("question", "left"), [("<image>\nQ", "Q"), ("Q\n<image>", "Q"), ("Q <image>", "Q "), ("<image>", "")]
)
def test_the_placeholder_is_taken_out(question: str, left: str) -> None:
    assert parse_row(row(question, "a", image="i.png"), "").turns == [(f"Instruction: {left}\nResponse:", "a")]


@pytest.mark.parametrize(
    ("entry", "message", "at"),
    [
        ("text", "an entry must be a mapping, got str 'text'", ""),
        ({"id": "r"}, "key 'conversations' is missing", ""),
        (row(conversations="hi"), "'conversations' must be list, got str 'hi'", ""),
        (row(), "pairs of a human and a gpt turn", ""),
        (row("a"), "pairs of a human and a gpt turn", ""),
        (row("a", "b", "c"), "pairs of a human and a gpt turn", ""),
        (said("gpt", "gpt"), "'from' must be 'human' here, got 'gpt'", ", conversations[0]"),
        (said("human", "human"), "'from' must be 'gpt' here, got 'human'", ", conversations[1]"),
        (row(conversations=[{"from": "human"}] * 2), "key 'value' is missing", ", conversations[0]"),
        (row(conversations=[1, 2]), "an entry must be a mapping, got int 1", ", conversations[0]"),
        (row("a\udc00", "b"), "'value' is not valid Unicode", ", conversations[0]"),
        (row("a", "see <image>"), "an answer holds <image>", ", conversations[1]"),
        (row("<image>", "b"), "1 <image> placeholders for 0 images", ""),
        (row("a", "b", image="i.png"), "0 <image> placeholders for 1 images", ""),
        (row("<image><image>", "b", image="i.png"), "2 <image> placeholders for 1 images", ""),
        (row("<image>", "b", image=["i.png", "j.png"]), "the row has 2 images, one is supported", ""),
        (row("<image>", "b", image=[3]), "'image' must be str", ""),
        (row("<image>", "b", image=True), "'image' must be str", ""),
        (row("a", "b", id=[]), "'id' must be str or int or null", ""),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(write_json: WriteJson, layout: Layout, entry: Any, message: str, at: str) -> None:
    for path, where in (
        (write_json("my.json", [row("a", "b"), entry]), "row 2"),
        (write_json("my.jsonl", json.dumps(row("a", "b")) + "\n" + json.dumps(entry)), "line 2"),
    ):
        with pytest.raises(DataError) as caught:
            Rows(path, "", layout)
        assert message in caught.value.what
        assert caught.value.where == f"{path}, {where}{at}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "not valid JSON"),
        ("a.json", {"all": []}, "must hold a list of rows"),
        ("a.json", [], "no rows"),
        ("a.jsonl", " \n", "no rows"),
        ("a.json", "[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_a_broken_file(write_json: WriteJson, layout: Layout, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rows(write_json(name, content), "", layout)


def test_a_file_that_is_not_text(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe[]")
    with pytest.raises(DataError, match="not UTF-8"):
        Rows(path, "", layout)


def test_images_stay_in_their_folder(write_json: WriteJson, write_image: Callable[..., Path], layout: Layout) -> None:
    folder = write_json("my.json", []).parent / "pictures"
    outside = write_image(folder.parent / "secret.png")
    write_image(folder.parent / "pictures2" / "a.png")
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    for name in ("../secret.png", str(outside), "link.png", "../pictures2/a.png"):
        with pytest.raises(DataError, match="outside of its folder") as caught:
            Rows(write_json("my.json", [row("<image>", "b", image=name)]), str(folder), layout)
        assert caught.value.where.endswith("my.json, row 1")
    for name, message in (("no.png", "is missing"), (".", "is missing"), ("a\0b", "NUL"), ("x" * 5000, "is missing")):
        with pytest.raises(DataError, match=message):
            Rows(write_json("my.json", [row("<image>", "b", image=name)]), str(folder), layout)
    with pytest.raises(DataError, match=r"names an image: 'a\.png'") as caught:
        Rows(write_json("my.json", [row("<image>", "b", image="a.png")]), "", layout)
    assert "--image_folder" in caught.value.do


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["human", "gpt", "<image>"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["id", "image", "conversations", "from", "value"]), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(JSON)
def test_any_json_is_a_row_or_a_data_error(entry: Any) -> None:
    try:
        parsed = parse_row(entry, "here")
    except DataError as error:
        assert error.where.startswith("here")
    else:
        assert parsed.turns


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(max_size=20), st.text("ab .:/\n<image>\u00e4", max_size=12)), min_size=1, max_size=4))
def test_user_text_is_never_a_target(layout: Layout, turns: list[tuple[str, str]]) -> None:
    values = [text.replace("<image>", "").replace("\ud800", "") for turn in turns for text in turn]
    parsed = parse_row(row(*values), "here")
    sample = layout.turns("x", parsed.turns)
    targets = [label for label in sample.labels if label != IGNORE]
    answers = "".join(answer for _, answer in parsed.turns)
    if not sample.truncated:
        assert targets[-1] == layout.tokenizer.eos_id
        assert layout.tokenizer.decode(targets) in (answers, answers.removeprefix(" "))
