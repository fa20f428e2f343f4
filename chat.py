"""Ask a trained run about a picture: `python chat.py --run runs/demo --image I.png --question '...'`."""

from __future__ import annotations

import sys

from engine.errors import run_command
from engine.flags import parse_chat


def main(argv: list[str]) -> int:
    """Parse and answer. Returns the exit code."""
    config = parse_chat(argv)
    from engine.chat import chat

    return chat(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
