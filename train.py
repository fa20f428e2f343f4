"""Fine-tune a vision-language model: `torchrun train.py --bits 4bit`, or `python train.py --help`."""

from __future__ import annotations

import os
import sys

from engine.errors import run_command
from engine.flags import parse_train


def main(argv: list[str]) -> int:
    """Parse, then plan or train. Returns the exit code."""
    config, notes = parse_train(argv)
    if config.plan:
        from engine.plan.make import plan_text, plan_without_weights

        plan = plan_without_weights(config, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            for note in notes:
                print(f"warning: {note}", file=sys.stderr)
            print(plan.to_json() if config.json else plan_text(plan))
        return 0
    if config.dry_run:
        from engine.dry_run import dry_run

        return dry_run(config, ["train.py", *argv], notes)
    from engine.run import train

    return train(config, ["train.py", *argv], notes)


if __name__ == "__main__":
    sys.exit(run_command(main))
