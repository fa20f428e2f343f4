"""Reading JSON files and taking typed values out of their entries; what is wrong is named by file, entry and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import DataError


def read_text(path: Path, do: str) -> str:
    """The file's text. Raises DataError with the advice `do` when it is missing, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8 text", where=str(path), why=str(error), do=do) from error
    except OSError as error:
        raise DataError("the file cannot be read", where=str(path), why=error.strerror or str(error), do=do) from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises DataError at `where` when it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise DataError("not valid JSON", where=where, why=why, do="repair or copy the file again") from error
    except RecursionError as error:
        raise DataError("JSON nested too deeply", where=where, do="rows have at most a few levels") from error


def read_json(path: Path, do: str) -> Any:
    """The value of a JSON file; `do` is the advice when the file cannot be read."""
    return parse_json(read_text(path, do), str(path))


def take(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """entry[key], checked to be of `kind`. None in `kind` may also be a missing key.

    Raises:
        DataError: the entry is no mapping, the key is missing, the value is of another type or not valid Unicode.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"an entry must be a mapping, got {_show(entry)}", where=where)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in entry and type(None) not in kinds:
        raise DataError(f"key {key!r} is missing", where=where, why=f"the entry has {sorted(map(str, entry))}")
    value = entry.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise DataError(f"{key!r} must be {expected}, got {_show(value)}", where=where)
    if isinstance(value, str):
        _check_unicode(value, key, where)
    return value


def _check_unicode(value: str, key: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"{value[error.start]!r} at character {error.start} is half of a surrogate pair"
        raise DataError(f"{key!r} is not valid Unicode", where=where, why=why) from error


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
