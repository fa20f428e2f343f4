"""Write a run or a checkpoint as other projects read it: `python export.py --run R --to llava-hf --output DIR`."""

from __future__ import annotations

import sys

from engine.errors import run_command
from engine.flags import parse_export


def main(argv: list[str]) -> int:
    """Parse and export. Returns the exit code."""
    config, notes = parse_export(argv)
    from engine.export.export import export

    return export(config, notes)


if __name__ == "__main__":
    sys.exit(run_command(main))
