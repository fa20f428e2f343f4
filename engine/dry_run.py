"""`--dry-run`: everything a run does, small and thrown away. Take two steps, save, reload."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence

from engine.config import Config, run_directory
from engine.errors import UsageError
from engine.run import train

STEPS = 2


def dry_run(config: Config, argv: Sequence[str], notes: Sequence[str]) -> int:
    """Runs two steps beside the run directory, then resumes from what they saved. Returns the exit code.

    An error is the one that the real run would end with; what it wrote stays for a look.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--dry_run runs on one rank", do="type python train.py ... --dry_run, without torchrun")
    small = copy.deepcopy(config)
    small.log.evaluate = "none"
    folder = run_directory(config).with_name(f"{run_directory(config).name}.dry-run")
    small.output_dir = str(folder)
    shutil.rmtree(folder, ignore_errors=True)
    train(small, argv, notes, max_steps=STEPS)
    small.resume = "auto"
    train(small, argv, (), max_steps=STEPS)  # loads what was saved; no step is left
    shutil.rmtree(folder, ignore_errors=True)
    print("dry run: two steps were taken, saved and read back; nothing was kept")
    return 0
