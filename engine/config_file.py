"""A configuration as YAML: recipes and the config.yaml of a run.

A file may leave out what it does not change. Unknown keys, values of another type and OmegaConf's interpolations
(a recipe from elsewhere must not read the environment) are errors that name the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from engine.config import Config, EvalConfig, leaves
from engine.errors import UsageError
from engine.suggest import did_you_mean

Tree = TypeVar("Tree", Config, EvalConfig)


def to_yaml(config: Config | EvalConfig) -> str:
    """The whole tree, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(path: str | Path, tree: type[Tree] = Config) -> Tree:  # type: ignore[assignment]
    """Read a file into a configuration; what it leaves out keeps its default.

    Raises:
        UsageError: the file is missing, is no YAML mapping, or has a key or value that the tree does not accept.
    """
    where = str(path)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~nobody has no home folder
        raise UsageError(f"cannot read {where!r}", where="--recipe", why=str(error)) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is no YAML file", where=where, why=" ".join(str(error).split())) from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"{where} holds a {type(content).__name__}", where=where, do="write `key: value` lines")
    refuse_interpolation(content, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(tree), OmegaConf.create(content))
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UsageError(f"unknown key {key!r}", where=where, do=did_you_mean(key, leaves(tree))) from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{error.full_key or 'the file'} does not fit: {reason}", where=where) from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, tree)
    return config


def refuse_interpolation(content: object, where: str, path: str = "") -> None:
    """Raises UsageError where a text in `content` (nested dicts and lists) would have OmegaConf fill something in."""
    if isinstance(content, dict):
        for key, value in content.items():
            refuse_interpolation(value, where, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list):
        for value in content:
            refuse_interpolation(value, where, path)
    elif isinstance(content, str) and ("${" in content or content == "???"):
        raise UsageError(f"{path} is {content!r}", where=where, why="values are taken as they stand")
