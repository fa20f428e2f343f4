from __future__ import annotations

import pytest

from engine.data.prompts import FORMATS, check_format, prompt, target
from engine.errors import UsageError

PROBLEM = {
    "question": "Which is  it?",
    "hint": "Look  here.",
    "choices": ["cup", "plate", "fork"],
    "answer": 1,
    "lecture": "First.\nSecond.",
    "solution": "It is\nround.",
}
LECTURE, SOLUTION = "First.\\nSecond.", "It is\\nround."
Q, C, M = "Question: Which is it?", "Context: Look here.", "Options: (A) cup (B) plate (C) fork"

PROMPTS = {
    "QCM": [Q, C, M],
    "CQM": [C, Q, M],
    "QCML": [Q, C, M, f"BECAUSE: {LECTURE}"],
    "QCME": [Q, C, M, f"BECAUSE: {SOLUTION}"],
    "QCMLE": [Q, C, M, f"BECAUSE: {LECTURE} {SOLUTION}"],
    "QCLM": [Q, C, f"BECAUSE: {LECTURE}", M],
    "QCEM": [Q, C, f"BECAUSE: {SOLUTION}", M],
    "QCLEM": [Q, C, f"BECAUSE: {LECTURE} {SOLUTION}", M],
}
TARGETS = {
    "A": "The answer is B.",
    "AL": f"The answer is B. BECAUSE: {SOLUTION}",
    "AE": f"The answer is B. BECAUSE: {LECTURE}",
    "ALE": f"The answer is B. BECAUSE: {LECTURE} {SOLUTION}",
    "LA": f"{LECTURE} The answer is B.",
    "EA": f"{SOLUTION} The answer is B.",
    "LEA": f"{LECTURE} {SOLUTION} The answer is B.",
    "ELA": f"{SOLUTION} {LECTURE} The answer is B.",
}


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_every_format(prompt_format: str) -> None:
    check_format(prompt_format)
    asked, answered = prompt_format.split("-")
    assert prompt(PROBLEM, prompt_format) == "\n".join([*PROMPTS[asked], "Response:"])
    assert target(PROBLEM, prompt_format) == TARGETS[answered]


def test_the_allowed_formats_are_lavins() -> None:
    assert len(FORMATS) == len(set(FORMATS)) == 23
    for refused in ("QCM-AEL", "QCM", "QCML-ALE", "qcm-ale", ""):
        with pytest.raises(UsageError, match="unknown prompt format"):
            check_format(refused)


def test_context() -> None:
    without = PROBLEM | {"hint": ""}
    assert "\nContext: N/A\n" in prompt(without, "QCM-ALE")
    assert "\nContext: a map\n" in prompt(without, "QCM-ALE", caption="a map")
    assert "\nContext: Look here. a map\n" in prompt(PROBLEM, "QCM-ALE", caption="a map")


def test_because_stays_without_an_explanation() -> None:
    bare = PROBLEM | {"lecture": "", "solution": ""}
    assert target(bare, "QCM-ALE") == "The answer is B. BECAUSE:"
    assert target(bare, "QCM-LEA") == "The answer is B."


def test_one_pass_over_double_spaces() -> None:
    assert "a  b c" in prompt(PROBLEM | {"question": "a   b  c"}, "QCM-A")


def test_braces_in_a_problem_are_text_and_letters_can_be_chosen() -> None:
    problem = PROBLEM | {"lecture": "{letter} {0}", "solution": "{"}
    assert target(problem, "QCM-ALE", "vwxyz") == "The answer is w. BECAUSE: {letter} {0} {"
    assert "(v) cup (w) plate (x) fork" in prompt(problem, "QCM-ALE", "vwxyz")


def test_the_published_example() -> None:
    problem = {
        "question": "Which of these states is farthest north?",
        "hint": "",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "lecture": "Maps have four cardinal directions.",
        "solution": "West Virginia is farthest north.",
    }
    assert prompt(problem, "QCM-ALE") == (
        "Question: Which of these states is farthest north?\nContext: N/A\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma\nResponse:"
    )
    assert target(problem, "QCM-ALE").startswith("The answer is A. BECAUSE: Maps have")
