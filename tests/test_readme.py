"""What README.md tells people to type is understood, what it names is there, and its tables are the code's."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

import doctor
from benchmarks import command, suite
from engine.config import Legacy, leaves
from engine.data import preview
from engine.data.rows import parse_row
from engine.errors import DataError, NibbleError
from engine.flags import parse_chat, parse_eval, parse_export, parse_train
from engine.memory_size import gib
from engine.plan.make import Plan, plan_without_weights
from kernels import compile as compiler
from scripts import verify_real

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What its scripts say and nothing here needs to hear.
IDLE_IN_LAVINS_LINES = {
    "--data_path", "--cpu_load", "--tokenizer_path", "--caption_file", "--dataset.captions", "--max_batch_size",
}  # fmt: skip
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    """The words of every command, lines that end in a backslash joined, variables in front left out."""
    text = "".join(blocks("bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    found = []
    for words in lines:
        while words and ENVIRONMENT.fullmatch(words[0]):
            words = words[1:]
        found.append(words)
    return [words for words in found if words]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(name, arguments) of what python or torchrun starts; None for other commands."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] not in ("python", "torchrun"):
        return None
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launcher = words[1:at]
    assert launcher == [] or (len(launcher) == 2 and launcher[0] == "--nproc_per_node" and launcher[1].isdigit())
    return words[at], words[at + 1 :]


def type_it(script: str, argv: list[str]) -> list[str]:
    """Parses a command's flags; returns what it would warn about."""
    if script == "train.py":
        return parse_train(argv)[1]
    if script == "eval.py":
        return parse_eval(argv)[1]
    if script == "chat.py":
        parse_chat(argv)
    elif script == "export.py":
        return parse_export(argv)[1]
    elif script == "doctor.py":
        doctor.options(argv)
    elif script == "kernels.compile":
        compiler.options(argv)
    elif script in ("kernels.traffic", "benchmarks.report"):
        assert argv == []
    elif script == "benchmarks.suite" and "--tiny" in argv:  # it runs anywhere, for a minute
        assert suite.main([*argv, "--list"]) == 0
    elif script == "benchmarks.suite":
        with pytest.raises(SystemExit, match="4"):  # the flags are right, the GPU is missing
            suite.main(argv)
    elif script.startswith("benchmarks."):
        with pytest.raises(SystemExit, match="4"):
            command.main(suite.bench(script.removeprefix("benchmarks.")), argv)
    else:
        assert script == "engine.data.preview"
        with pytest.raises(DataError, match=re.escape(argv[0])):  # the flags are right, the file is a person's own
            preview.main([argv[0]])
        with pytest.raises(NibbleError):
            preview.main(argv)
    return []


@pytest.mark.parametrize("words", command_lines(), ids=lambda words: " ".join(words)[:60])
def test_every_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if script := script_of(words):
        notes = type_it(*script)
        assert [note for note in notes if note.split()[0] not in IDLE_IN_LAVINS_LINES] == []
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    elif words[0] == "pip":
        assert words[1:] in (
            ["install", "."],
            ["install", "-c", "constraints.txt", ".[hub]"],
            ["wheel", ".", "--no-deps"],
        )  # setup.py, tests/csrc/test_build.py
    else:
        assert words == ["source", ".venv/bin/activate"]


def test_the_line_of_verify_real_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[list[str]] = []
    monkeypatch.setattr(verify_real, "check_files", lambda *paths: None)
    monkeypatch.setattr(verify_real, "evaluate", lambda line: typed.append(line) or 88.35)
    (words,) = [words for words in command_lines() if "verify-real" in words]
    arguments = next(word.removeprefix("ARGS=") for word in words if word.startswith("ARGS="))
    assert verify_real.main(shlex.split(arguments)) == 0
    assert parse_eval(typed[0])[0].adapter.init == "sqa-llama-7b-lite.pth"


def test_all_commands_of_the_project_are_shown() -> None:
    shown = {script[0] for words in command_lines() if (script := script_of(words))}
    assert {path.name for path in ROOT.glob("*.py")} - {"setup.py"} <= shown  # which is pip's


def test_what_is_named_is_there() -> None:
    named = set(re.findall(r"recipes/[\w.-]+", README)) | set(re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
    assert named and {path for path in named if not (ROOT / path).exists()} == set()
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings()}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def headings() -> list[str]:
    return re.findall(r"^#+ (.+)$", README, re.MULTILINE)


def test_the_rows_are_rows() -> None:
    (text,) = blocks("json")
    first, second = (parse_row(entry, "README.md") for entry in json.loads(text))
    assert (first.image, len(first.turns), second.image) == ("cup.png", 2, None)


def test_every_legacy_switch_is_explained() -> None:
    assert set(re.findall(r"^\| `--legacy\.(\w+)`", README, re.MULTILINE)) == set(leaves(Legacy))


def test_exit_codes_are_the_promised_ones() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)}
    assert table == {0, *(kind.exit_code for kind in NibbleError.__subclasses__())}


def plan_of(recipe: str, *flags: str) -> Plan:
    """Without weights."""
    size = "13B" if "13b" in recipe else "7B"
    config, _ = parse_train(["--recipe", f"recipes/{recipe}.yaml", "--model.language", f"{os.devnull}/{size}", *flags])
    return plan_without_weights(config, 1)


def test_figures_of_the_plan_are_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_of("lavin-7b-lite")
    assert f"{gib(plan.memory_bytes['total'])} predicted" in README
    assert f"{plan.trainable_parameters:,}, the same" in README
    assert f"{12_726 // plan.samples_per_step * 20:,} steps" in README


def test_the_table_of_memory_and_speed_is_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure in it is predicted, and said to be, as long as benchmarks/results has no row for it."""
    monkeypatch.chdir(ROOT)
    recipes = ("lavin-7b-lite", "lavin-13b-lite")
    least_flags = ("--gradient_checkpointing", "--runtime.tokens_per_batch", "512")
    plans, least = [plan_of(recipe) for recipe in recipes], [plan_of(recipe, *least_flags) for recipe in recipes]
    rows = [
        ("memory, nothing recomputed", *(gib(plan.memory_bytes["total"]) for plan in plans)),
        (f"memory, `{' '.join(least_flags)}`", *(gib(plan.memory_bytes["total"]) for plan in least)),
    ]
    for both in zip(*(plan.cards for plan in plans), strict=True):
        cells = (f"{card.samples_per_second:.1f} samples/s, {card.hours:.1f} h" for card in both)
        rows.append((both[0].card, *cells))
    for row in rows:
        assert "| " + " | ".join((f"{row[0]}, predicted", *row[1:])) + " |" in README, "\n".join(map(str, rows))
