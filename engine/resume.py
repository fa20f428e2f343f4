"""`--resume`: the state of an earlier run of the same settings, or an error that says what differs."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint import find_latest, load_checkpoint
from engine.config import Config, get, leaves
from engine.config_file import from_yaml
from engine.errors import CheckpointError
from engine.settle import RECORDED
from engine.setup import Setup
from engine.trainer import Trainer
from models.weights.identity import check_identity

# What may differ from the run that is resumed. Where files lie is nobody's business: what they hold is compared by hash
# (weights) or by number (samples).
FREE = (
    "output_dir", "recipe", "resume", "plan", "json", "dry_run", "debug", "log.", "runtime.", "eval_data", "eval_every",
    "data", "image_folder", "dataset.root", "dataset.captions", "dataset.num_workers", "dataset.eval_split",
    "model.language", "model.tokenizer", "model.vision", "model.delta", "model.cache_weights",
    "model.projector_weights", "adapter.init", "optim.epochs", "gradient_checkpointing", "memory_budget",
    "legacy.decode_positions", "legacy.score_whole_text", "legacy.eval_8bit_as_4bit",
)  # fmt: skip
# A run records what `auto` came to; runs from before there were these settings did not.
RECORDED_NOW = ("model.projector", "model.patch_merge", "dataset.image_aspect_ratio", "dataset.anyres_grids")


def changed_settings(before: Config, now: Config) -> list[str]:
    """The settings that change a run's numbers and are not what they were: `optim.lr: 0.001, now 0.01`."""
    changed = []
    for path in leaves(Config):
        is_free = any(path == free or (free.endswith(".") and path.startswith(free)) for free in FREE)
        is_unknown = path in RECORDED_NOW and get(before, path) == "auto"
        if not is_free and not is_unknown and get(before, path) != get(now, path):
            changed.append(f"{path}: {get(before, path)!r}, now {get(now, path)!r}")
    return changed


def resume(setup: Setup, trainer: Trainer) -> bool:
    """Puts the state of --resume back. Returns whether there was one.

    Raises:
        CheckpointError: no checkpoint is whole, or this command would train something else.
    """
    wanted, run = setup.config.resume, setup.rundir.path
    if not wanted:
        return False
    path = setup.ranks.from_main(lambda: find_latest(run)) if wanted == "auto" else Path(wanted)
    if path is None:
        setup.ranks.say(f"nothing to resume in {run}: the run begins")
        return False
    tensors, state = load_checkpoint(path, "size" if wanted == "auto" else "full")  # "auto" has just read all of it
    check_identity(state["base"], setup.sources.files)
    here = {"seed": setup.config.seed, **trainer.state_extras}
    was, now = (f"seed {s['seed']}, {s['samples_per_step']} of {s['samples']} samples a step" for s in (state, here))
    if was != now:
        raise CheckpointError(
            f"{path} was trained with {was}; this command says {now}",
            why="the order of the samples would be another", do="resume with the settings of its config.yaml",
        )  # fmt: skip
    changed = changed_settings(from_yaml(path.parent / "config.yaml"), setup.config)
    if changed:
        raise CheckpointError(
            f"{path} was trained with other settings", where="; ".join(changed),
            do="resume with its settings (config.yaml), or begin a new run with --adapter.init",
        )  # fmt: skip
    trainer.load(tensors, state, path)
    trainer.state_extras["accuracy_before"] = state.get("accuracy_before", {})
    trainer.state_extras |= {name: state[name] for name in RECORDED if name in state}
    setup.ranks.say(f"resumed from {path}")
    return True
