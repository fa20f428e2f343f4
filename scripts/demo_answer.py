"""Ask the trained demo about a picture of its test split: the last step of `make demo`."""

from __future__ import annotations

import json
import sys

import chat
from engine.data.prompts import question_with_options
from engine.demo.cache import demo_data
from engine.errors import run_command


def main(argv: list[str]) -> int:
    """Print a question, its right answer and the command that asks it, then run that command with `argv` added."""
    root = demo_data()
    problems = json.loads((root / "problems.json").read_text(encoding="utf-8"))
    test = json.loads((root / "pid_splits.json").read_text(encoding="utf-8"))["test"]
    qid = next(qid for qid in test if problems[qid]["image"] and not problems[qid]["hint"])
    problem = problems[qid]
    command = [*argv, "--image", str(root / "images" / "test" / qid / problem["image"])]
    command += ["--question", question_with_options(problem)]
    print(f"python chat.py {' '.join(command[:-1])} '{command[-1]}'")
    print(f"right: {'ABCDE'[problem['answer']]}", flush=True)
    return chat.main(command)


if __name__ == "__main__":
    sys.exit(run_command(main))
