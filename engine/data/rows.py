"""LLaVA-style rows: a .json list or a .jsonl file of {id, image, conversations: [{from: human|gpt, value}, ...]}.

A conversation is one sample, its turns in LaVIN's instruction format one after another, each ended by EOS:

    Instruction: {question}\\nResponse:{answer}</s> Instruction: {question}\\nResponse:{answer}</s>

Every answer and its EOS are targets. `<image>` is taken out of the questions: LaVIN puts the image's tokens at the head
of the sequence. A row has at most one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.fields import parse_json, read_text, take
from engine.data.images import resolve
from engine.data.layout import Layout
from engine.data.sample import Sample
from engine.errors import DataError

PLACEHOLDER = "<image>"


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row: prompts and answers as they will be tokenised."""

    id: str
    turns: list[tuple[str, str]]
    image: str | None  # as the row names it
    where: str


class Rows:
    """The rows of `path`, with images under `image_folder`.

    All rows are checked here, images for their presence, so that a run does not stop hours later.

    Raises:
        DataError: names the file, the row (counted from 1; of a .jsonl the line) and the key.
    """

    def __init__(self, path: str | Path, image_folder: str, layout: Layout) -> None:
        self.layout = layout
        self._rows = read_rows(Path(path))
        self._images = [_find_image(row, image_folder) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return self._rows[index].where

    def sample(self, index: int) -> Sample:
        """The whole conversation, laid out for training."""
        row = self._rows[index]
        return self.layout.turns(row.id, row.turns, self._images[index])


def read_rows(path: Path) -> list[Row]:
    """All rows of a .json or .jsonl file, checked; images are not looked for."""
    text = read_text(path, do="give a .json list or a .jsonl file with --data")
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [parse_row(parse_json(line, where), where) for where, line in lines]
    else:
        entries = parse_json(text, str(path))
        if not isinstance(entries, list):
            raise DataError("the file must hold a list of rows", where=str(path), why=f"got {type(entries).__name__}")
        rows = [parse_row(entry, f"{path}, row {n}") for n, entry in enumerate(entries, 1)]
    if not rows:
        raise DataError("the file has no rows", where=str(path))
    return rows


def parse_row(entry: Any, where: str) -> Row:
    """One row. Raises DataError at `where` for a key that is missing or wrong."""
    conversation = take(entry, "conversations", list, where)
    image = _image_name(entry, where)
    if not conversation or len(conversation) % 2:
        why = f"got {len(conversation)} turns"
        raise DataError("'conversations' must be pairs of a human and a gpt turn", where=where, why=why)
    values = []
    for number, turn in enumerate(conversation):
        at = f"{where}, conversations[{number}]"
        role, expected = take(turn, "from", str, at), ("human", "gpt")[number % 2]
        if role != expected:
            raise DataError(f"'from' must be {expected!r} here, got {role!r}", where=at, why="human and gpt take turns")
        values.append(take(turn, "value", str, at))
        if expected == "gpt" and PLACEHOLDER in values[-1]:
            raise DataError(f"an answer holds {PLACEHOLDER}", where=at, why="only a human turn can show an image")
    count, images = sum(value.count(PLACEHOLDER) for value in values), int(image is not None)
    if count != images:
        raise DataError(f"{count} {PLACEHOLDER} placeholders for {images} images", where=where)
    questions = [_without_placeholder(value) for value in values[::2]]
    prompts = [instruction(question) for question in questions]
    row_id = take(entry, "id", (str, int, type(None)), where)
    return Row(where if row_id is None else str(row_id), list(zip(prompts, values[1::2], strict=True)), image, where)


def instruction(question: str) -> str:
    """One turn's prompt, in the form of LaVIN's chat data."""
    return f"Instruction: {question}\nResponse:"


def _image_name(entry: dict[str, Any], where: str) -> str | None:
    found = take(entry, "image", (str, list, type(None)), where)
    images = found if isinstance(found, list) else [] if found is None else [found]
    if len(images) > 1:
        raise DataError(f"the row has {len(images)} images, one is supported", where=where)
    name: str | None = take({"image": images[0]}, "image", str, where) if images else None
    return name


def _without_placeholder(question: str) -> str:
    for marker in (PLACEHOLDER + "\n", "\n" + PLACEHOLDER, PLACEHOLDER):
        question = question.replace(marker, "")
    return question


def _find_image(row: Row, folder: str) -> str | None:
    if row.image is None:
        return None
    if not folder:
        raise DataError(
            f"the row names an image: {row.image!r}", where=row.where, do="say where images lie with --image_folder"
        )
    return resolve(folder, row.image, row.where)
