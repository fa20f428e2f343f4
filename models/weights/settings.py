"""Reads the JSON files that stand beside weights (params.json, config.json, indices) and checks their numbers.

A file from elsewhere must not make anything allocate without limit, so every number has a range.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from models.weights.errors import WeightsError

MOST_BYTES = 64 << 20
MOST_VOCABULARY = 1 << 20
MOST_WIDTH = 1 << 17
MOST_LAYERS = 1 << 10
MOST_POSITIONS = 1 << 24
MOST_PIXELS = 1 << 14  # a side of a picture or a tile


class Settings:
    """The object in a JSON file. Every problem is a WeightsError that names the file and the key."""

    def __init__(self, path: Path, values: dict[str, object]) -> None:
        self.path = path
        self.values = values

    def integer(self, key: str, *, most: int, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise WeightsError(self.path, f"{key} is {value!r}; expected an integer from {least} to {most}")
        return value

    def real(self, key: str, *, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise WeightsError(self.path, f"{key} is {value!r}; expected a positive number")
        return float(value)

    def share(self, key: str) -> float:
        """A probability below 1; 0 where it is absent."""
        value = self.values.get(key)
        if value is None:
            return 0.0
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise WeightsError(self.path, f"{key} is {value!r}; expected a number from 0 to below 1")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; false where it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise WeightsError(self.path, f"{key} is {value!r}; expected true or false")
        return bool(value)

    def text(self, key: str) -> str:
        """A string; empty where it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise WeightsError(self.path, f"{key} is {value!r}; expected a string")
        return value or ""

    def respelled(self, keys: Mapping[str, str]) -> Settings:
        """The same with old keys under their new names; where both are given, the new one counts."""
        new = {keys[key]: value for key, value in self.values.items() if key in keys}
        kept = {key: value for key, value in self.values.items() if value is not None or key not in new}
        return Settings(self.path, new | kept)

    def with_defaults(self, values: Mapping[str, object]) -> Settings:
        """The same, with `values` where a key is absent or null."""
        return Settings(self.path, {**values, **{k: v for k, v in self.values.items() if v is not None}})

    def only(self, key: str, *accepted: object) -> None:
        """Refuses a value that would need another architecture. An absent key and null are accepted."""
        value = self.values.get(key)
        if value is not None and value not in accepted:
            choices = " or ".join(map(repr, accepted)) or "its absence"
            raise WeightsError(self.path, f"{key} {value!r} is not supported; accepted is {choices}")

    def inner(self, key: str) -> Settings | None:
        """The object under `key`, None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise WeightsError(self.path, f"{key} is {value!r}; expected an object")
        return Settings(self.path, value)


def read_settings(path: Path) -> Settings:
    """The JSON object in `path`.

    Raises:
        WeightsError: the file is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise WeightsError(path, f"is larger than {MOST_BYTES >> 20} MiB; a file of settings is not")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(path, f"is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(path, f"holds a {type(values).__name__}; expected an object")
    return Settings(path, values)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
