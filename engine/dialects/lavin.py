"""LaVIN's command lines (github.com/luogen1996/LaVIN): train.py with argparse, eval.py with python-fire.

A flag either has a place in our tree, or a rule below, or no effect, which is said. Without a recipe LaVIN's own
defaults hold; with one, only the flags that are given are translated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.command_line import Flag
from engine.config import Config
from engine.errors import UsageError

DATA_ROOT = "../data"
BITS = {"16bits": "16bit", "8bits": "8bit", "4bits": "4bit"}


@dataclass(frozen=True, slots=True)
class Known:
    """What becomes of one of LaVIN's flags."""

    to: str = ""  # path in our tree; empty: a rule, or no effect
    default: str = ""  # LaVIN's default, where it has one that matters
    rename: Mapping[str, str] = field(default_factory=dict)  # its values -> ours, where they differ
    nothing: str = ""  # why it has no effect


_BY_TORCHRUN = Known(nothing="torchrun says which ranks there are")
_STREAMED = Known(nothing="weights are always streamed, one tensor at a time")
RULE = Known()

_SHARED = {
    "adapter_dim": Known("adapter.dim", "8"),
    "adapter_scale": Known("adapter.scale", "1"),
    "adapter_type": Known("adapter.language", "attn", {"repattn": "attn"}),
    "bits": Known("bits", "16bit", BITS),
    "caption_file": Known("dataset.captions"),
    "cpu_load": _STREAMED,
    "data_root": RULE,
    "hidden_proj": Known("model.projector_hidden", "128"),
    "llm_model": RULE,
    "n_prompt": RULE,
    "options": RULE,
    "temperature": Known("adapter.temperature", "10"),
    "use_caption": Known("dataset.use_caption"),
    "use_vicuna": RULE,
    "visual_adapter_type": Known("adapter.vision", "normal"),
}

TRAIN: dict[str, Known] = _SHARED | {
    "accum_iter": Known("optim.accum_iter", "1"),
    "batch_size": Known("optim.batch_size", "64"),
    "blr": Known("optim.blr", "1e-3"),
    "clip_grad": Known("optim.clip_grad"),
    "data_path": Known(nothing="LaVIN reads it nowhere"),
    "device": RULE,
    "dist_on_itp": _BY_TORCHRUN,
    "dist_url": _BY_TORCHRUN,
    "do_pretrain": RULE,
    "drop_path": Known("model.drop_path", "0"),
    "epochs": Known("optim.epochs", "400"),
    "gradient_checkpointing": Known("gradient_checkpointing"),
    "llama_model_path": RULE,
    "local_rank": _BY_TORCHRUN,
    "log_dir": Known(nothing="everything of a run is in its output_dir"),
    "lr": Known("optim.lr"),
    "max_seq_len": Known("dataset.max_seq_len", "512"),
    "min_lr": Known("optim.min_lr", "0"),
    "no_pin_mem": Known(nothing="memory is pinned where there is a GPU"),
    "num_workers": Known("dataset.num_workers", "10"),
    "output_dir": Known("output_dir", "./output_dir"),
    "pin_mem": Known(nothing="memory is pinned where there is a GPU"),
    "prompt_format": Known("dataset.prompt_format", "CQM-A"),
    "resume": RULE,
    "seed": Known("seed", "0"),
    "start_epoch": Known(nothing="a resumed run knows where it was"),
    "warmup_epochs": Known("optim.warmup_epochs", "40"),
    "weight_decay": Known("optim.weight_decay", "0.05"),
    "world_size": _BY_TORCHRUN,
}

EVAL: dict[str, Known] = _SHARED | {
    "adapter_path": Known("adapter.init"),
    "ckpt_dir": RULE,
    "generation_temperature": Known("generation_temperature", "0.1"),
    "max_batch_size": Known("max_batch_size"),
    "max_seq_len": Known("dataset.max_seq_len"),
    "prompt_format": Known("dataset.prompt_format", "QCM-ALE"),
    "split": Known("split", "val"),
    "tokenizer_path": Known(nothing="LaVIN takes tokenizer.model from --ckpt_dir, and so do we"),
    "top_p": Known("top_p", "0.75"),
}


def speaks_train(flags: Iterable[Flag]) -> bool:
    """Whether this is a line for LaVIN's train.py."""
    return any(flag.name in ("llama_model_path", "llm_model") for flag in flags)


def speaks_eval(flags: Iterable[Flag]) -> bool:
    """Whether this is a line for LaVIN's eval.py."""
    return any(flag.name == "ckpt_dir" for flag in flags)


def train(flags: Sequence[Flag], recipe: Config | None) -> tuple[list[Flag], list[str]]:
    """-> (canonical flags in order, what to warn about). Flags that are not LaVIN's are kept as they are."""
    given = {flag.name: flag for flag in flags if flag.name in TRAIN}
    front = [*_weights(given, "llama_model_path", recipe), *_data(given, flags, recipe), *_options(given)]
    if recipe is None:
        ours = [_set("optim.reduction", "micro_batch"), _set("log.lavin_checkpoints", "True")]
        front = [*_defaults(TRAIN), *ours, *front]
    if "device" in given:
        front.append(_set("runtime.device", given["device"].value.partition(":")[0], given["device"]))
    if _value(given, "resume"):
        front.append(_resume(given["resume"]))
    return [*front, *_translated(flags, TRAIN)], _notes(given, TRAIN, recipe)


def evaluate(flags: Sequence[Flag]) -> tuple[list[Flag], list[str]]:
    """Like `train`, for eval.py. LaVIN generates every answer; here --generate asks for that."""
    given = {flag.name: flag for flag in flags if flag.name in EVAL}
    front = [*_defaults(EVAL), *_weights(given, "ckpt_dir", None), *_options(given)]
    front.append(_set("dataset.root", _value(given, "data_root", DATA_ROOT)))
    return [*front, *_translated(flags, EVAL)], _notes(given, EVAL, None)


def _value(given: Mapping[str, Flag], name: str, default: str = "") -> str:
    return given[name].value if name in given else default


def _set(path: str, value: str, source: Flag | None = None) -> Flag:
    return Flag(path, (value,), source.typed if source else f"--{path}")


def _defaults(table: Mapping[str, Known]) -> list[Flag]:
    return [_set(known.to, known.default) for known in table.values() if known.to and known.default]


def _translated(flags: Sequence[Flag], table: Mapping[str, Known]) -> list[Flag]:
    """LaVIN's flags that have a place in our tree under their new name, foreign ones as they are, the rest left out."""
    kept: list[Flag] = []
    for flag in flags:
        known = table.get(flag.name)
        if known is None:
            kept.append(flag)
        elif known.to:
            kept.append(Flag(known.to, tuple(known.rename.get(value, value) for value in flag.values), flag.typed))
    return kept


def _weights(given: Mapping[str, Flag], folder_flag: str, recipe: Config | None) -> list[Flag]:
    """Weights are in {folder}/{size}, their tokenizer in {folder}, the delta in {data_root}/weights/vicuna_{size}.

    LaVIN always takes the delta from ../data, which is what this gives with its default --data_root.
    """
    was = Path(recipe.model.language) if recipe and recipe.model.language else Path("llama/7B")
    folder = Path(_value(given, folder_flag, str(was.parent)))
    size = _value(given, "llm_model", was.name)
    found = [_set("model.language", str(folder / size)), _set("model.tokenizer", str(folder / "tokenizer.model"))]
    vicuna = given["use_vicuna"].on if "use_vicuna" in given else bool(recipe and recipe.model.delta)
    moved = {"use_vicuna", "data_root", "llm_model"} & given.keys()
    if moved or recipe is None:
        default = recipe.dataset.root if recipe and recipe.dataset.root else DATA_ROOT
        root = Path(_value(given, "data_root", default))
        found.append(_set("model.delta", str(root / "weights" / f"vicuna_{size}") if vicuna else ""))
    return found


def _data(given: Mapping[str, Flag], flags: Sequence[Flag], recipe: Config | None) -> list[Flag]:
    """ScienceQA in --data_root, or the chat data there; rows of one's own (--data) take the place of both."""
    own_rows = any(flag.name == "data" for flag in flags)
    chat = "do_pretrain" in given and given["do_pretrain"].on
    found = []
    if "data_root" in given or (recipe is None and not own_rows):
        found.append(_set("dataset.root", _value(given, "data_root", DATA_ROOT)))
    if chat or (recipe is None and not own_rows):
        found.append(_set("dataset.format", "chat" if chat else "scienceqa"))
    return found


def _options(given: Mapping[str, Flag]) -> list[Flag]:
    """The letters of ABCDE, of ["A","B"] or of A B, whichever way they are written."""
    if "options" not in given:
        return []
    return [_set("dataset.options", "".join(filter(str.isalpha, "".join(given["options"].values))), given["options"])]


def _resume(flag: Flag) -> Flag:
    """LaVIN resumes from a .pth, which has no more than adapter weights for us; our own runs from a step directory."""
    if "://" in flag.value:
        raise UsageError(
            f"cannot resume from {flag.value!r}", where=flag.typed, why="nothing is downloaded", do="download it first"
        )
    return _set("adapter.init" if flag.value.endswith(".pth") else "resume", flag.value, flag)


def _notes(given: Mapping[str, Flag], table: Mapping[str, Known], recipe: Config | None) -> list[str]:
    idle = {flag.typed: table[name].nothing for name, flag in given.items() if table[name].nothing}
    notes = [f"{typed} has no effect: {reason}" for typed, reason in idle.items()]
    if (slots := _value(given, "n_prompt", "6")) != "6":
        notes.append(f"--n_prompt {slots} has no effect: a picture has 6 tokens, one for each tap of the vision tower")
    if _value(given, "visual_adapter_type", "" if recipe else "normal") == "normal":
        notes.append(
            "--visual_adapter_type normal (LaVIN's default) has no router; LaVIN's scripts and files have `router`. "
            "It keeps its residual here: --legacy.normal_adapter leaves it out, as LaVIN does"
        )
    if (path := _value(given, "resume")).endswith(".pth"):
        notes.append(
            f"--resume {path} brings adapter weights only; optimiser and schedule start anew "
            "(--resume auto continues a run of ours as it was)"
        )
    return notes
