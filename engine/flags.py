"""Command lines -> configurations.

A flag's canonical name is its path in the tree of engine/config.py: --optim.lr 1e-4 (hyphens and underscores are the
same; a switch may be --plan, --no-plan or --plan=True). --recipe FILE is read first and the other flags override it.
Flags of another project are translated by its dialect (engine/dialects/), which is recognised by its model flag and may
be mixed with canonical flags. The last of two flags for the same thing counts.

OmegaConf converts and checks the values, by the same rules as those of a recipe; tyro prints --help from the same tree.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from engine.checks import effectless, validate
from engine.command_line import Flag, split
from engine.config import ChatConfig, Config, EvalConfig, get, leaves
from engine.config_file import from_yaml, refuse_interpolation
from engine.dialects import lavin
from engine.errors import UsageError
from engine.export.config import ExportConfig, check_export
from engine.export.config import effectless as idle_exports
from engine.suggest import did_you_mean

Tree = TypeVar("Tree", Config, EvalConfig, ChatConfig, ExportConfig)

DEMO = Path(__file__).parent / "demo" / "demo.yaml"  # the settings where nothing is named to train on
WHAT_TO_TRAIN = {"data", "dataset.root", "model.language"}
FILES = {  # leaves that name a file or a folder
    "data", "image_folder", "output_dir", "eval_data", "resume", "run", "output", "image", "model.language",
    "model.tokenizer", "model.vision", "model.delta", "model.projector_weights", "adapter.init", "dataset.root",
    "dataset.captions", "checkpoint", "base", "tokenizer", "vision",
}  # fmt: skip


def parse_train(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The checked configuration of train.py, and what to warn about.

    Raises:
        UsageError: a flag, a value, the recipe or the combination is wrong.
        SystemExit: --help was asked for and printed.
    """
    _help(argv, Config, "train.py", "Fine-tune a vision-language model. Without flags it trains the embedded demo.")
    flags = split(argv)
    recipe = next((flag.value for flag in reversed(flags) if flag.name == "recipe"), "")
    spoken = lavin.speaks_train(flags)
    is_demo = not spoken and not any(flag.name in WHAT_TO_TRAIN for flag in flags)
    base = from_yaml(recipe) if recipe else from_yaml(DEMO) if is_demo else Config()
    if any(flag.name == "data" for flag in flags):  # own rows take the place of the recipe's data set
        base.dataset.root, base.dataset.format = "", "auto"
    notes: list[str] = []
    if spoken:
        flags, notes = lavin.train(flags, base if recipe else None)
    config = validate(_override(base, flags, lavin.TRAIN, spoken=spoken))
    return config, [*notes, *effectless(config, base)]


def parse_eval(argv: Sequence[str]) -> tuple[EvalConfig, list[str]]:
    """The checked configuration of eval.py, and what to warn about. Raises as parse_train does."""
    _help(argv, EvalConfig, "eval.py", "Evaluate a run, or an adapter file on its base weights.")
    flags = split(argv)
    notes: list[str] = []
    spoken = lavin.speaks_eval(flags)
    if spoken:
        flags, notes = lavin.evaluate(flags)
    config = validate(_override(EvalConfig(), flags, lavin.EVAL, spoken=spoken))
    return config, [*notes, *effectless(config)]


def parse_chat(argv: Sequence[str]) -> ChatConfig:
    """The checked configuration of chat.py. Raises as parse_train does."""
    _help(argv, ChatConfig, "chat.py", "Talk to a trained run.")
    return validate(_override(ChatConfig(), split(argv), (), spoken=False))


def parse_export(argv: Sequence[str]) -> tuple[ExportConfig, list[str]]:
    """The checked configuration of export.py, and what to warn about. Raises as parse_train does."""
    _help(argv, ExportConfig, "export.py", "Write a run or a checkpoint in another project's format, or an average.")
    config = check_export(_override(ExportConfig(), split(argv), (), spoken=False))
    return config, idle_exports(config)


def _help(argv: Sequence[str], tree: type[Tree], program: str, description: str) -> None:
    if "-h" in argv or "--help" in argv:  # tyro prints it and raises SystemExit(0)
        tyro.cli(tree, prog=program, description=description, args=["--help"], use_underscores=True)


def _override(base: Tree, flags: Sequence[Flag], foreign: Collection[str], *, spoken: bool) -> Tree:
    """`base` with these flags set. `foreign`: a dialect's flags, for hints; `spoken`: whether it was recognised."""
    known = leaves(type(base))
    tree = OmegaConf.structured(base)
    for flag in flags:
        group, dot, last = flag.name.rpartition(".")
        negated = group + dot + last.removeprefix("no_")
        if flag.name in known:
            path, value = flag.name, _value(flag, known[flag.name])
        elif known.get(negated) is bool:
            path, value = negated, not flag.on
        else:
            raise _unknown(flag, known, foreign, spoken=spoken)
        refuse_interpolation(value, flag.typed, path)
        try:
            OmegaConf.update(tree, path, value)
        except ValidationError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{flag.typed} is {value!r}", where=flag.typed, why=reason) from error
    return _at_home(typing.cast(Tree, OmegaConf.to_object(tree)))


def _at_home(tree: Tree) -> Tree:
    """`tree` with the home folder in place of a leading ~, which a shell replaces in a word of its own only: neither in
    --data=~/my.json nor in a recipe."""
    for path in FILES & leaves(type(tree)).keys():
        group, _, name = path.rpartition(".")
        value = get(tree, path)
        if value.startswith("~"):
            try:
                setattr(get(tree, group) if group else tree, name, str(Path(value).expanduser()))
            except RuntimeError as error:
                raise UsageError(f"{path} is {value!r}", where=f"--{path}", why=str(error)) from error
    return tree


def _value(flag: Flag, kind: Any) -> str | bool | list[str] | None:
    """A flag's value, still as text unless it is a switch, a list or None."""
    if kind is bool:
        return flag.on
    if kind == list[str]:
        return list(flag.values)
    optional = type(None) in typing.get_args(kind)
    return None if optional and flag.value == "None" else flag.value


def _unknown(flag: Flag, known: Collection[str], foreign: Collection[str], *, spoken: bool) -> UsageError:
    candidates = [*known, *foreign] if spoken else known
    return UsageError(
        f"unknown flag {flag.typed}",
        where="command line",
        why="LaVIN's flags are read beside its model flags (--llama_model_path, --llm_model; eval.py: --ckpt_dir)"
        if flag.name in foreign
        else "",
        do=did_you_mean(flag.name, candidates, prefix="--") or "--help lists the flags",
    )
