"""ScienceQA problems as prompt and target strings, in LaVIN's formats.

A format is `<input>-<output>`. The input's letters are the order of its lines: Q question, C context, M choices,
then L lecture and E solution on a line `BECAUSE: ...`. The output's A is the answer, L and E explain it; in `AL` and
`AE` alone the two letters mean each other's text, as in ScienceQA's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import UsageError

_OUTPUTS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE")
FORMATS = (
    *(f"CQM-{output}" for output in _OUTPUTS),
    *(f"QCM-{output}" for output in _OUTPUTS),
    "QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE",
)  # fmt: skip

# Explanations of an input, by the letters that remain without Q, C and M.
_INPUT_EXPLANATIONS = {"L": "{lecture}", "E": "{solution}", "LE": "{lecture} {solution}"}
_TARGETS = {
    "A": "The answer is {letter}.",
    "AL": "The answer is {letter}. BECAUSE: {solution}",
    "AE": "The answer is {letter}. BECAUSE: {lecture}",
    "ALE": "The answer is {letter}. BECAUSE: {lecture} {solution}",
    "LA": "{lecture} The answer is {letter}.",
    "EA": "{solution} The answer is {letter}.",
    "LEA": "{lecture} {solution} The answer is {letter}.",
    "ELA": "{solution} {lecture} The answer is {letter}.",
}


def check_format(prompt_format: str) -> None:
    """Raises UsageError unless `prompt_format` is one of FORMATS."""
    if prompt_format not in FORMATS:
        raise UsageError(
            f"unknown prompt format {prompt_format!r}",
            where="--dataset.prompt_format",
            do=f"choose one of {', '.join(FORMATS)}",
        )


def prompt(problem: Mapping[str, Any], prompt_format: str, options: str = "ABCDE", caption: str = "") -> str:
    """What the model is asked: the lines of the input, then `Response:` on its own line."""
    letters = prompt_format.split("-")[0]
    context = f"{problem['hint']} {caption}".strip() or "N/A"
    choices = _choices(problem, options)
    lines = {"Q": f"Question: {problem['question']}", "C": f"Context: {context}", "M": f"Options: {choices}"}
    text = [lines[letter] for letter in letters if letter in lines]
    explained = "".join(letter for letter in letters if letter not in lines)
    if explained:
        text.insert(letters.index(explained), "BECAUSE: " + _fill(_INPUT_EXPLANATIONS[explained], problem))
    return _tidy("\n".join([*text, "Response:"]))


def question_with_options(problem: Mapping[str, Any], options: str = "ABCDE") -> str:
    """The question as a person types it in chat.py: `How many? (A) one (B) two`."""
    return f"{problem['question']} {_choices(problem, options)}"


def _choices(problem: Mapping[str, Any], options: str) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(options, problem["choices"], strict=False))


def target(problem: Mapping[str, Any], prompt_format: str, options: str = "ABCDE") -> str:
    """What the model must answer. Without lecture and solution, `BECAUSE:` stays at the end, as LaVIN trains it."""
    template = _TARGETS[prompt_format.split("-")[1]]
    return _tidy(_fill(template, problem, letter=options[problem["answer"]]))


def _fill(template: str, problem: Mapping[str, Any], letter: str = "") -> str:
    escaped = {key: problem[key].replace("\n", "\\n") for key in ("lecture", "solution")}
    return template.format(letter=letter, **escaped)


def _tidy(text: str) -> str:
    """One pass over double spaces, not repeated: three spaces become two."""
    return text.replace("  ", " ").strip()
