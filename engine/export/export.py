"""export.py: opens what is exported, plans, writes whole or not at all, and says what can be done with it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.errors import UsageError
from engine.export.config import ExportConfig, Format, parse_average, shard_bytes
from engine.export.folder import new_folder, require_new
from engine.export.formats import Plan, plan_hf, plan_lavin, plan_llava, plan_merged, plan_peft
from engine.export.from_checkpoint import open_export_checkpoint
from engine.export.from_run import open_run
from engine.export.llava_hf import plan_llava_hf
from engine.export.origin import Origin
from engine.export.tokenizer_files import COPIED
from engine.memory_size import gib
from engine.precision import DTYPES
from engine.sources import located
from engine.tensor_file import TensorWriter
from models.weights.lora_settings import CONFIG_NAME
from models.weights.write.average import average
from models.weights.write.entries import size_of
from models.weights.write.llava import FormatError, folder_notes
from models.weights.write.shards import write_shards

PLANS: Mapping[Format, Callable[[Origin, ExportConfig], Plan]] = {
    "hf": plan_hf, "peft": plan_peft, "llava": plan_llava, "llava-hf": plan_llava_hf, "lavin": plan_lavin,
    "merged": plan_merged,
}  # fmt: skip
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def export(config: ExportConfig, notes: Sequence[str]) -> int:
    """Runs `export.py`. `notes` are warnings about what was typed. Returns the exit code.

    Raises:
        UsageError: the format cannot say this model (with what can), or the flags do not fit.
        CheckpointError, WeightsError: files are missing or wrong.
    """
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    require_new(Path(config.output))
    if config.average:
        return _average(config)
    origin = _open(config)
    try:
        plan = PLANS[config.to](origin, config)
        with new_folder(Path(config.output), plan.size) as folder:
            plan.write(folder)
    except FormatError as error:
        raise UsageError(str(error), where=f"--to {config.to}", do=_instead(config)) from error
    finally:
        origin.close()
    _report(f"{origin.name} as {config.to}", Path(config.output), plan.size, plan.notes)
    return 0


def _instead(config: ExportConfig) -> str:
    """What can be done with a model that a format cannot say."""
    if config.to == "llava-hf":
        return "--to llava writes it in the format of its own project"
    if config.project != "auto":
        return f"leave --project {config.project} out"
    return "--to hf writes the language model alone"


def _open(config: ExportConfig) -> Origin:
    if config.run:
        return open_run(Path(config.run), config.base, config.vision, config.tokenizer)
    return open_export_checkpoint(config.checkpoint, config.base, config.vision, config.tokenizer)


def _average(config: ExportConfig) -> int:
    """Weighted sums, with the settings and the tokenizer of the last folder."""
    items = parse_average(config)
    folders = [located(Path(folder).expanduser()) for folder, _ in items]
    for folder in folders:
        _require_no_lora(folder)
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    entries = average(folders, [weight for _, weight in items], dtype)
    size = size_of(entries)
    with new_folder(Path(config.output), size) as target:
        write_shards(target, entries, TensorWriter, largest=shard_bytes(config))
        for name in (*SETTINGS, *COPIED):
            if (folders[-1] / name).is_file():
                shutil.copyfile(folders[-1] / name, target / name)
    formula = " + ".join(f"{weight:g} {folder}" for folder, weight in items)
    _report(f"{formula}, with the settings of {items[-1][0]}", Path(config.output), size)
    return 0


def _require_no_lora(folder: Path) -> None:
    if (folder / CONFIG_NAME).is_file():
        raise UsageError(
            f"{folder} is a LoRA", where="--average", why="an average is of whole models",
            do=f"--checkpoint {folder} --base BASE --to merged makes one of it",
        )  # fmt: skip


def _report(what: str, output: Path, size: int, notes: Sequence[str] = ()) -> None:
    files = sorted(path.name for path in output.iterdir())
    print(f"export     {what}")
    print(f"written    {output}: {gib(size)} of weights, {len(files)} files")
    print(f"files      {', '.join(files)}", flush=True)
    for note in (*notes, *folder_notes(output)):
        print(f"note       {note}", flush=True)
