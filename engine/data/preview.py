"""What a model sees of a row: `python -m engine.data.preview FILE.json` shows it, targets apart from masked text.

    my.json, row 1: 57 tokens, 12 targets, 6 of an image
      masked | Image:
      image  | 6 tokens, /data/pictures/1.png
      masked | Instruction: What is on the table?
      masked | Response:
      target | A cup.</s>

Without a tokenizer the text is shown as it will be tokenised, and nothing is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, TextIO

from engine.data.image_processor import ImageProcessor
from engine.data.images import load_image, resolve
from engine.data.layout import Layout
from engine.data.rows import Row, read_rows
from engine.data.sample import Sample
from engine.data.tokenizer import Tokenizer, open_tokenizer
from engine.errors import run_command

Kind = Literal["head", "masked", "target", "image"]
Line = tuple[Kind, str]

_STYLES = {"head": "bold", "masked": "dim", "target": "green", "image": "cyan"}


def describe(sample: Sample, tokenizer: Tokenizer) -> str:
    """One decoded sample with its mask as plain text: a line of counts, then its text line by line."""
    return "\n".join(_plain(line) for line in sample_lines(sample, tokenizer, sample.id))


def sample_lines(sample: Sample, tokenizer: Tokenizer, name: str) -> list[Line]:
    """A line of counts, then the sample's runs of masked text, image tokens and targets, decoded."""
    slots, targets = set(sample.image_slots), set(sample.supervised)

    def kind(j: int) -> Kind:
        return "image" if j in slots else "target" if j in targets else "masked"

    counts = f"{len(sample.input_ids)} tokens, {len(targets)} targets"
    counts += f", {len(slots)} of an image" if slots else ""
    lines: list[Line] = [("head", f"{name}: {counts}{', cut at the end' if sample.truncated else ''}")]
    begin = 0  # of the text since the last image or EOS
    for run, places in groupby(range(len(sample.input_ids)), key=kind):
        positions = list(places)
        start, end = positions[0], positions[-1] + 1
        if run == "image":
            lines.append((run, f"{end - start} tokens, {sample.image}"))
            begin = end
        else:
            before = tokenizer.decode(sample.input_ids[begin:start])  # decoded apart, a run would lose its first space
            text = tokenizer.decode(sample.input_ids[begin:end])[len(before) :]
            ends = sample.input_ids[end - 1] == tokenizer.eos_id
            lines += _text_lines(run, text + tokenizer.name_of(tokenizer.eos_id) * ends)
            begin = end if ends else begin
    return lines


def row_lines(row: Row) -> list[Line]:
    """A row without a tokenizer: its text and image as they will be laid out."""
    lines: list[Line] = [("head", row.where)]
    if row.image is not None:
        lines.append(("image", row.image))
    for prompt, answer in row.turns:
        lines += _text_lines("masked", prompt) + _text_lines("target", answer)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the first rows of a file. Raises the errors of the row reader, the tokenizer and the images."""
    parser = argparse.ArgumentParser(prog="python -m engine.data.preview", description="show rows as a model sees them")
    parser.add_argument("file", type=Path, help="LLaVA-style rows, .json or .jsonl")
    parser.add_argument(
        "--tokenizer", default="", help="tokenizer.model or tokenizer.json; without it nothing is counted"
    )
    parser.add_argument("--image_folder", default="", help="where the images lie; without it they are not opened")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens a sample is cut to")
    parser.add_argument("--limit", type=int, default=8, help="rows to show")
    options = parser.parse_args(argv)
    layout = Layout(open_tokenizer(options.tokenizer), options.max_seq_len) if options.tokenizer else None
    rows = read_rows(options.file)
    for row in rows[: options.limit]:
        image = row.image
        if image is not None and options.image_folder:
            image = resolve(options.image_folder, image, row.where)
            load_image(image, ImageProcessor(), row.where)
        if layout is None:
            lines = row_lines(row)
        else:
            lines = sample_lines(layout.turns(row.id, row.turns, image), layout.tokenizer, row.where)
        _show(lines, sys.stdout)
    print(f"{min(options.limit, len(rows))} of {len(rows)} rows shown, all {len(rows)} are well formed")
    return 0


def _text_lines(kind: Kind, text: str) -> list[Line]:
    """One line each; what a terminal would obey is shown escaped."""
    return [
        (kind, "".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
        for line in text.strip("\n").split("\n")
    ]  # fmt: skip


def _plain(line: Line) -> str:
    kind, text = line
    return text if kind == "head" else f"  {kind:<6} | {text}"


def _show(lines: Sequence[Line], stream: TextIO) -> None:
    if not stream.isatty():
        print("\n".join(_plain(line) for line in lines), file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream)
    for line in lines:
        console.print(Text(_plain(line), style=_STYLES[line[0]]))


if __name__ == "__main__":
    sys.exit(run_command(main))
