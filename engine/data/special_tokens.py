"""What the small files beside a tokenizer say: which tokens begin and end a text, pad it, and were added later.

tokenizer_config.json is asked first, then special_tokens_map.json, then, for the end alone, generation_config.json and
config.json, which name ids. All are optional.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Names of tokens as their files give them; None where none does."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    eos_ids: tuple[int, ...] = ()  # as the model's configuration says; any of them ends an answer
    add_bos: bool | None = None  # whether a text begins with `bos`; None: as the tokenizer itself does
    legacy: bool | None = None  # sentencepiece's white space after special tokens
    added: Mapping[str, int] = field(default_factory=dict)  # tokens that may not be in the tokenizer's own file
    special: frozenset[str] = frozenset()  # those of `added` that are no text
    trims: bool = False  # one of them takes the white space beside it (Phi-3's), as only tokenizer.json can tell


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Raises DataError for a file that is no JSON object."""
    config = _read(folder / "tokenizer_config.json")
    names = _read(folder / "special_tokens_map.json")
    decoder = {value["content"]: (int(i), bool(value.get("special"))) for i, value in _added(config)}
    listed = {name: i for name, i in _read(folder / "added_tokens.json").items() if isinstance(i, int)}
    bos, eos, pad, unk = (_name(config, names, f"{part}_token") for part in ("bos", "eos", "pad", "unk"))
    special = {name for name, (_, is_special) in decoder.items() if is_special} | {bos, eos, pad, unk}
    return SpecialTokens(
        bos=bos, eos=eos, pad=pad, unk=unk,
        eos_ids=_ids(_read(folder / "generation_config.json")) or _ids(_read(folder / "config.json")),
        add_bos=_flag(config, "add_bos_token"),
        legacy=_flag(config, "legacy"),
        added={name: i for name, (i, _) in decoder.items()} | listed,
        special=frozenset(name for name in special if name is not None),
        trims=any(value.get("lstrip") or value.get("rstrip") for _, value in _added(config)),
    )  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("a file of the tokenizer cannot be read", where=str(file), why=str(error)) from error
    if not isinstance(content, dict):
        raise DataError("a file of the tokenizer must hold an object", where=str(file), why=type(content).__name__)
    return content


def _added(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = config.get("added_tokens_decoder")
    return list(found.items()) if isinstance(found, dict) else []


def _name(config: Mapping[str, Any], names: Mapping[str, Any], key: str) -> str | None:
    for file in (config, names):
        value = file.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _ids(file: Mapping[str, Any]) -> tuple[int, ...]:
    value = file.get("eos_token_id")
    return tuple(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
