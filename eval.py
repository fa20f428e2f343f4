"""Score a run, or an adapter file on its base weights, on ScienceQA: `python eval.py --run runs/demo`."""

from __future__ import annotations

import sys

from engine.errors import run_command
from engine.flags import parse_eval


def main(argv: list[str]) -> int:
    """Parse and evaluate. Returns the exit code."""
    config, notes = parse_eval(argv)
    from engine.evaluation.scienceqa import evaluate

    return evaluate(config, notes)


if __name__ == "__main__":
    sys.exit(run_command(main))
