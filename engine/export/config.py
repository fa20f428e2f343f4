"""What export.py can be told. No torch here: --help must be quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from engine.errors import UsageError
from engine.memory_size import parse_size

Format = Literal["hf", "peft", "llava", "llava-hf", "lavin", "merged"]
Precision = Literal["auto", "fp16", "bf16", "fp32"]
Template = Literal[
    "auto", "none", "instruction", "scienceqa", "vicuna_v1", "llava_llama_3", "bunny", "bunny_llama", "imp_phi2",
    "imp_phi3",
]  # fmt: skip

IDLE: dict[str, tuple[Format, ...]] = {  # flag -> formats that it changes nothing of
    "to": (),
    "dtype": ("lavin",),
    "project": ("hf", "lavin"),
    "template": ("hf", "peft", "llava", "lavin", "merged"),
    "tokenizer": ("lavin",),
    "vision": ("lavin",),
    "shard_size": ("peft", "lavin"),
}
OF_AVERAGES = ("dtype", "shard_size")
SLACK = 1e-6  # by which the weights of an average may miss 1: 0.1 + 0.2 + 0.7 is not 1 in binary


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """An export of a run (--run) or of a checkpoint (--checkpoint), or the average of checkpoints (--average)."""

    run: str = ""
    """Run directory to export, or one of its step directories."""
    checkpoint: str = ""
    """Folder or Hub id to export instead: a language model, a VLM, a LoRA or a projector, in any known format."""
    base: str = ""
    """Folder or Hub id of what a run, a LoRA or a projector was trained on. Empty: what it says itself."""
    average: list[str] = field(default_factory=list)
    """Folders with their weights, A:0.3 B:0.7: the weighted sum of all tensors, with the last one's settings."""
    any_sum: bool = False
    """Let the weights of --average have another sum than 1."""
    to: Format = "merged"
    """hf: the language model. peft: the LoRA. llava: what LLaVA, Bunny or Imp leave at the end of such a training.
    merged: the whole model in their format. llava-hf: transformers' LLaVA. lavin: LaVIN's adapters."""
    output: str = ""
    """Folder to write; it must not be there yet, or be empty."""
    dtype: Precision = "auto"
    """Type of the written weights. auto: that of the base's files; adapters and projectors alone as trained."""
    project: Literal["auto", "llava", "bunny", "imp"] = "auto"
    """Whose names llava, merged and peft use, and whose chat template llava-hf has. auto: the one of the three whose
    format says all of the model."""
    vision: str = ""
    """Folder, file or Hub id of the tower, where the checkpoint has none; also what config.json will call it."""
    tokenizer: str = ""
    """Folder with the tokenizer's files. Empty: beside the weights."""
    template: Template = "auto"
    """Chat template of llava-hf. auto: a run's own prompt; of a checkpoint, by its language model."""
    shard_size: str = "5GB"
    """Largest file of weights."""
    debug: bool = False
    """Show tracebacks."""


def check_export(config: ExportConfig) -> ExportConfig:
    """`config`, after looking at its flags together.

    Raises:
        UsageError: a flag is missing, or two exclude each other.
    """
    given = [f"--{name}" for name in ("run", "checkpoint", "average") if getattr(config, name)]
    if len(given) != 1:
        raise UsageError(
            f"export.py has {' and '.join(given) or 'nothing'} to export", where="command line",
            do="give one of --run R, --checkpoint PATH, --average A:0.3 B:0.7",
        )  # fmt: skip
    if not config.output:
        raise UsageError("export.py has nowhere to write", where="--output", do="--output DIR, a new folder")
    if config.base and config.average:
        raise UsageError("--base with --average", where="--base", why="an average has none", do="leave it out")
    if config.any_sum and not config.average:
        raise UsageError("--any_sum without --average", where="--any_sum", do="leave it out")
    if config.average:
        parse_average(config)
    shard_bytes(config)
    return config


def effectless(config: ExportConfig) -> list[str]:
    """One sentence for each flag that differs from its default and changes nothing in what is written."""
    changed = [f.name for f in fields(config) if f.name in IDLE and getattr(config, f.name) != f.default]
    if config.average:
        idle = [name for name in changed if name not in OF_AVERAGES]
        return [f"--{name} has no effect with --average, which has the settings of its last folder" for name in idle]
    notes = [f"--{name} has no effect with --to {config.to}" for name in changed if config.to in IDLE[name]]
    if "project" in changed and config.to == "llava-hf" and (config.run or config.template != "auto"):
        why = "a run has its own chat template" if config.run else "--template names the chat template"
        notes.append(f"--project has no effect with --to llava-hf: {why}")
    return notes


def shard_bytes(config: ExportConfig) -> int:
    """The largest file of weights in bytes.

    Raises:
        UsageError: shard_size is no size.
    """
    try:
        size = parse_size(config.shard_size)
    except ValueError as error:
        raise UsageError(f"shard_size is {config.shard_size!r}", where="--shard_size", why=str(error)) from error
    if not size:
        raise UsageError(f"shard_size is {config.shard_size!r}", where="--shard_size", do="give a size, such as 5GB")
    return size


def parse_average(config: ExportConfig) -> list[tuple[str, float]]:
    """-> [(folder, weight), ...]: A:0.3 is the folder A with weight 0.3.

    Raises:
        UsageError: an item is not FOLDER:WEIGHT, or the weights do not add up to 1 and nobody said that they may.
    """
    items = [_item(text) for text in config.average]
    total = math.fsum(weight for _, weight in items)
    if not config.any_sum and abs(total - 1) > SLACK:
        raise UsageError(
            f"the weights of --average add up to {total:g}", where="--average",
            why="an average has weights that add up to 1; they are used as they are given, never rescaled",
            do="change them, or say --any_sum",
        )  # fmt: skip
    return items


def _item(text: str) -> tuple[str, float]:
    folder, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (colon and folder and math.isfinite(weight)):
        raise UsageError(f"--average has {text!r}", where="--average", do="write FOLDER:WEIGHT, such as runs/a:0.3")
    return folder, weight
