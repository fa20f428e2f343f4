"""Checkpoints that are whole or absent.

    run/step-120/model.safetensors      trainable weights           {"language.layers.0...": tensor}
                 optimizer.safetensors  what is named optimizer/... {"exp_avg/NAME": tensor}
                 rng.safetensors        what is named rng/...
                 state.json             counters, schedule, choices made by measurement
                 manifest.json          schema, step, [bytes, crc32] of each file, its own crc32; written last
    run/latest, run/best                names of two of them: hints for people, never the truth

Written as .tmp-step-120-*, every file fsynced, then renamed, then the run directory fsynced. A crash at any point
leaves either the earlier checkpoints or those and the new one. Nothing here is ever a pickle.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.files import discard, require_free, step_dirs, write_atomic
from engine.manifest import Verify, check_manifest, damaged, write_manifest, write_new
from engine.tensor_file import write_tensors
from models.weights.whole import TEMPORARY, beside, sync

logger = logging.getLogger("nibble")


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *,
    keep: int = 2, best: int | None = None,
) -> Path:  # fmt: skip
    """Save step `step` and purge what is no longer kept. Returns run_dir/step-N.

    tensors: any device and dtype. The name GROUP/REST goes to GROUP.safetensors, one without a slash to
        model.safetensors.
    state: JSON values. keep: the newest checkpoints that stay, besides step `best`. Checkpoints of later steps are of a
    future that this run has left (it was resumed before them) and go too.

    Raises:
        CheckpointError: not enough disk (1.2 times the size is asked for), or any error while writing. The earlier
            checkpoints are intact then, and so are the tensors: training could go on.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    text = json.dumps(state)
    size = sum(t.nbytes + 256 for t in tensors.values()) + len(text) + 4096
    final = run_dir / f"step-{step}"
    temporary = beside(final, TEMPORARY)
    try:
        require_free(run_dir, size + size // 5, f"checkpoint {final.name}")
        temporary.mkdir()
        _write_files(temporary, step, tensors, text)
        _commit(temporary, final)
        write_atomic(run_dir / "latest", final.name + "\n")
        _point_to_best(run_dir, best)
        _purge(run_dir, step, keep, best)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot save checkpoint {final.name}: {error.strerror or error}",
            where=str(error.filename or run_dir),
            why="the earlier checkpoints were not touched",
            do="make room or the directory writable, then --resume auto",
        ) from error
    return final


def find_latest(run_dir: Path, verify: Verify = "full") -> Path | None:
    """The newest checkpoint whose manifest holds; None where there is none at all.

    A damaged one is named in the log with what is wrong, and the one before it is tried.
    verify: "full" reads every byte, "size" trusts the files' sizes.

    Raises:
        CheckpointError: there are checkpoints and none is whole. Starting from zero is a person's decision.
    """
    bad: list[str] = []
    for _, path in reversed(step_dirs(run_dir) if run_dir.is_dir() else []):
        try:
            check_manifest(path, verify)
        except CheckpointError as error:
            logger.warning("skipped a damaged checkpoint\n%s", error)
            bad.append(path.name)
        else:
            return path
    if bad:
        raise CheckpointError(
            f"no whole checkpoint among {', '.join(bad)}",
            where=str(run_dir),
            do="start again in another --output_dir; the log says what is wrong with each",
        )
    return None


def load_checkpoint(
    path: Path, verify: Verify = "full", only: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (tensors on the CPU under the names they were saved with, state).

    only: the groups to read ("model", "optimizer", "rng"), all by default.

    Raises:
        CheckpointError: anything is missing, damaged, swapped or of a newer format.
    """
    files = check_manifest(path, verify)
    tensors: dict[str, Tensor] = {}
    try:
        for name in files:
            group, _, kind = name.partition(".")
            if kind == "safetensors" and (only is None or group in only):
                prefix = "" if group == "model" else f"{group}/"
                tensors.update({prefix + key: tensor for key, tensor in load_file(path / name).items()})
        state: Any = json.loads((path / "state.json").read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return tensors, state


def _write_files(directory: Path, step: int, tensors: Mapping[str, Tensor], state: str) -> None:
    groups: dict[str, dict[str, Tensor]] = {"model": {}}
    for name, tensor in tensors.items():
        group, slash, rest = name.partition("/")
        groups.setdefault(group if slash else "model", {})[rest if slash else name] = tensor
    files = {f"{g}.safetensors": write_tensors(directory / f"{g}.safetensors", part) for g, part in groups.items()}
    files["state.json"] = write_new(directory / "state.json", state.encode())
    write_manifest(directory, step, files)
    sync(directory)


def _commit(temporary: Path, final: Path) -> None:
    """Give the directory its name. Where the step was saved before, that one steps aside under a name that
    find_latest() still sees, so that there is no moment without it."""
    if final.exists():
        aside = final.with_name(f".old-{final.name}")
        if aside.exists():
            discard(aside)
        final.rename(aside)
    temporary.rename(final)
    sync(final.parent)


def _point_to_best(run_dir: Path, best: int | None) -> None:
    if best is None:
        return
    if (run_dir / f"step-{best}").is_dir():
        write_atomic(run_dir / "best", f"step-{best}\n")
    else:
        logger.warning("the best step, %d, has no checkpoint in %s", best, run_dir)


def _purge(run_dir: Path, step: int, keep: int, best: int | None) -> None:
    """After a commit only. Keeps the newest `keep` up to `step`, and `best`."""
    numbers = sorted({n for n, _ in step_dirs(run_dir) if n <= step})[-keep:]
    kept = {f"step-{n}" for n in (*numbers, best)}
    for number, path in step_dirs(run_dir):
        if path.name in kept:
            continue
        if number > step:
            logger.warning("removed %s: this run was resumed before it and has now saved step-%d", path, step)
        discard(path)
