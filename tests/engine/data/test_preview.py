from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data.layout import Layout
from engine.data.preview import describe, main
from engine.errors import DataError

WriteJson = Callable[[str, Any], Path]
REPOSITORY = Path(__file__).parents[3]
ROWS = [
    {
        "id": "1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is  it?\nSay."},
            {"from": "gpt", "value": "A cup.\nRed."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes \x1b[31m"},
        ],
    },
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
]
TEXT = """\
  masked | Instruction: What is  it?
  masked | Say.
  masked | Response:
  target | A cup.
  target | Red.
  masked | Instruction: Sure?
  masked | Response:
  target | Yes \\x1b[31m"""


def test_describe(layout: Layout) -> None:
    sample = layout.pair("problem 3", "Question: Which?\nResponse:", "The answer is A.", "/x/a.png")
    targets = len(layout.tokenizer.encode("The answer is A.")) + 1
    lines = describe(sample, layout.tokenizer).split("\n")
    assert lines[0].startswith(f"problem 3: {len(sample.input_ids)} tokens, ") and lines[0].endswith(", 6 of an image")
    assert abs(int(lines[0].split()[4]) - targets) <= 1  # without its word start, the answer may need one token less
    assert lines[1:] == [
        "  masked | Image: ",
        "  image  | 6 tokens, /x/a.png",
        "  masked | Question: Which?",
        "  masked | Response:",
        "  target | The answer is A.</s>",
    ]


def test_describe_says_what_was_cut(layout: Layout) -> None:
    cut = Layout(layout.tokenizer, 40).pair("x", "Question: ", "The answer is " * 20)
    text = describe(cut, layout.tokenizer)
    assert text.startswith("x: 39 tokens, ") and "cut at the end" in text and "</s>" not in text


def test_rows_without_a_tokenizer(write_json: WriteJson, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json("my.json", ROWS)
    assert main([str(path), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert out == f"{path}, row 1\n  image  | a.png\n{TEXT}\n1 of 2 rows shown, all 2 are well formed\n"


def test_rows_with_a_tokenizer_and_images(
    write_json: WriteJson, write_image: Callable[..., Path], tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_json("my.json", ROWS)
    image = write_image(path.parent / "pictures" / "a.png")
    argv = [str(path), "--tokenizer", str(tokenizer_path), "--image_folder", str(image.parent)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    text = TEXT.replace("Red.", "Red.</s>")  # each answer has its end
    assert f"  masked | Image: \n  image  | 6 tokens, {image}\n{text}</s>\n" in out
    assert ", row 2: " in out and "  masked | Image: N/A Instruction: hi\n" in out
    image.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        main(argv)


def test_command_exits_with_3_and_no_traceback_on_a_bad_row(write_json: WriteJson) -> None:
    path = write_json("my.json", [{"id": 1}])
    done = subprocess.run(
        [sys.executable, "-m", "engine.data.preview", str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "key 'conversations' is missing" in done.stderr and "row 1" in done.stderr
    assert "Traceback" not in done.stderr
