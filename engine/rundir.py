"""A run's directory: always the same names, one writer, nothing of an earlier run overwritten by accident."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import UsageError
from engine.files import discard, step_dirs, sweep, write_atomic
from engine.lock import RunLock

logger = logging.getLogger("nibble")

SIGNS_OF_A_RUN = ("config.yaml", "metrics.jsonl", "exit.json")


class RunDir:
    """The paths of a run; creating the object touches nothing, so that every rank can have one.

    The process that writes (rank 0) calls claim() first and release() at the end, or uses `with run_dir.claim():`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.command = self.path / "command.txt"
        self.env = self.path / "env.json"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.metrics_csv = self.path / "metrics.csv"
        self.loss_svg = self.path / "loss.svg"
        self.log = self.path / "log.txt"
        self.latest = self.path / "latest"
        self.best = self.path / "best"
        self.report = self.path / "REPORT.md"
        self.metrics_final = self.path / "metrics_final.json"
        self.exit = self.path / "exit.json"
        self._lock = RunLock(self.path / ".lock")

    def claim(self, *, resume: bool = False, demo: bool = False) -> RunDir:
        """Create the directory, lock it, sweep what a killed process left, and decide about what is there already.

        resume: continue the run that is there (or begin one where there is none: restarts are safe to repeat).
        demo: this is the embedded demo, which may replace an earlier demo; only files that a run writes are removed.

        Without either, a run that got no further than its first checkpoint is begun anew in the same place.

        Raises:
            UsageError: the directory is in use, cannot be written, or holds a run worth keeping.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise UsageError(
                f"cannot write to the run directory: {error.strerror}",
                where=str(self.path),
                do="give another --output_dir",
            ) from error
        try:
            if swept := sweep(self.path):
                logger.info("removed leftovers of an interrupted save: %s", ", ".join(swept))
            if not resume:
                self._make_room(demo)
            self.exit.unlink(missing_ok=True)
        except BaseException:
            self._lock.release()
            raise
        return self

    def describe(self, config_yaml: str, argv: Sequence[str], environment: Mapping[str, object], *, demo: bool) -> None:
        """Write config.yaml and env.json, and add this launch to command.txt."""
        write_atomic(self.config, config_yaml)
        write_json(self.env, {**environment, "demo": demo})
        earlier = self.command.read_text(encoding="utf-8") if self.command.exists() else ""
        write_atomic(self.command, f"{earlier}{shlex.join(argv)}\n")

    def write_exit(self, code: int, reason: str) -> None:
        """exit.json: how the process ended; its absence means killed. `stopped`: on request, resume me."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.exit, {"code": code, "reason": reason, "stopped": code == 75, "time": when})

    def release(self) -> None:
        """Give the directory free for another process."""
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _make_room(self, demo: bool) -> None:
        steps = [path for _, path in step_dirs(self.path)]
        if not steps and not any((self.path / name).exists() for name in SIGNS_OF_A_RUN):
            return
        code = _read(self.exit).get("code")
        if demo and _read(self.env).get("demo") is True:
            logger.info("replaced the earlier demo in %s", self.path)
        elif steps or code == 0:
            self._refuse(steps, code)
        else:
            logger.info("%s held a run without a checkpoint; it is begun anew", self.path)
        self._remove_run(steps)

    def _refuse(self, steps: list[Path], code: object) -> None:
        state = "a finished run" if code == 0 else f"an unfinished run (newest checkpoint: {steps[-1].name})"
        keep_going = "" if code == 0 else "--resume auto to continue it, or "
        raise UsageError(
            f"{self.path} already holds {state}",
            why="a second run there would overwrite its results",
            do=f"{keep_going}another --output_dir"
            + (" (or --resume auto with more epochs to go on from its end)" if code == 0 else ""),
        )

    def _remove_run(self, steps: list[Path]) -> None:
        """Only what a run writes; a person's own files in the directory stay."""
        for step in steps:
            discard(step)
        for file in (self.config, self.command, self.env, self.metrics_jsonl, self.metrics_csv, self.loss_svg,
                     self.log, self.latest, self.best, self.report, self.metrics_final, self.exit):  # fmt: skip
            file.unlink(missing_ok=True)
        for pattern in ("checkpoint-*.pth", "eval-*.json"):
            for written in self.path.glob(pattern):
                written.unlink()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """A small JSON file for people and scripts, replaced as a whole."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def _read(path: Path) -> dict[str, object]:
    """A JSON object, or nothing where the file is absent or not one: then nothing is known about the earlier run."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
