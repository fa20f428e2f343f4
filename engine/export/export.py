"""export.py: opens what is exported, plans, writes whole or not at all, and says what can be done with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.errors import UsageError
from engine.export.config import ExportConfig, Format, parse_average, shard_bytes
from engine.export.folder import new_folder, require_new
from engine.export.formats import Plan, plan_hf, plan_lavin, plan_llava, plan_merged, plan_peft
from engine.export.from_checkpoint import open_export_checkpoint
from engine.export.from_run import open_run
from engine.export.origin import Origin
from engine.export.parts import DTYPES, size_of
from engine.export.served import plan_served
from engine.export.tokenizer_files import COPIED
from engine.memory_size import gib
from engine.sources import located
from engine.tensor_file import TensorWriter
from models.weights.lora_settings import CONFIG_NAME
from models.weights.settings import read_settings
from models.weights.write.average import average
from models.weights.write.llava import FormatError
from models.weights.write.shards import write_shards

PLANS: Mapping[Format, Callable[[Origin, ExportConfig], Plan]] = {
    "hf": plan_hf, "peft": plan_peft, "llava": plan_llava, "llava-hf": plan_served, "lavin": plan_lavin,
    "merged": plan_merged,
}  # fmt: skip
NAMED = {"llava": ("llava_llama",), "imp": ("imp", "imp_phi3")}  # a word that a loader looks for -> model_type
BY_NAME = ("llava_llama", "imp", "imp_phi3", "bunny-llama", "bunny-phi", "bunny-phi3", "bunny-stablelm")
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def export(config: ExportConfig) -> int:
    """Runs `export.py`. Returns the exit code.

    Raises:
        UsageError: the format cannot say this model (with what can), or the flags do not fit.
        CheckpointError, WeightsError: files are missing or wrong.
    """
    require_new(Path(config.output))
    if config.average:
        return _average(config)
    origin = _open(config)
    try:
        plan = PLANS[config.to](origin, config)
        with new_folder(Path(config.output), plan.size) as folder:
            plan.write(folder)
    except FormatError as error:
        raise UsageError(str(error), where=f"--to {config.to}") from error
    finally:
        origin.close()
    _report(f"{origin.name} as {config.to}", Path(config.output), plan.size)
    return 0


def _open(config: ExportConfig) -> Origin:
    if config.run:
        return open_run(Path(config.run), config.base, config.vision, config.tokenizer)
    return open_export_checkpoint(config.checkpoint, config.base, config.vision, config.tokenizer)


def _average(config: ExportConfig) -> int:
    """Weighted sums, with the settings and the tokenizer of the last folder."""
    items = parse_average(config)
    folders = [located(Path(folder).expanduser()) for folder, _ in items]
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


def _report(what: str, output: Path, size: int) -> None:
    files = sorted(path.name for path in output.iterdir())
    print(f"export     {what}")
    print(f"written    {output}: {gib(size)} of weights, {len(files)} files")
    print(f"files      {', '.join(files)}", flush=True)
    for note in folder_notes(output):
        print(f"note       {note}", flush=True)


def folder_notes(output: Path) -> list[str]:
    """What LLaVA's, Bunny's and Imp's loaders, which go by the folder's name, would make of this one."""
    config = output / "config.json"
    said = read_settings(config).values.get("model_type") if config.is_file() else ""
    name, is_lora = output.name.lower(), (output / CONFIG_NAME).is_file()
    wanted = [word for word, kinds in NAMED.items() if said in kinds and word not in name]
    notes = [f"the loader of {said} looks for {word!r} in the folder's name" for word in wanted]
    if said in BY_NAME and is_lora != ("lora" in name):
        rule = "'lora' in its name" if is_lora else "a name without 'lora'"
        notes.append(f"the loader of {said} takes a folder for a LoRA by its name: give it {rule}")
    return notes
