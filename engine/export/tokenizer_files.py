"""The tokenizer's files beside exported weights: copied, with the token <image> added where pictures need one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.special_tokens import read_special_tokens
from engine.data.tokenizer import JSON, SENTENCE_PIECES, open_tokenizer
from engine.errors import CheckpointError
from engine.export.folder import write_json

CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
COPIED = (
    SENTENCE_PIECES, JSON, CONFIG, "special_tokens_map.json", ADDED, "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
LLAMA = {  # what a bare tokenizer.model does not say; "legacy" is how LLaMA-1 and Meta's own code tokenize
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False,
}  # fmt: skip
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
PAD = "<pad>"


def copy_tokenizer(folders: Sequence[Path], target: Path) -> None:
    """Copies the tokenizer of the first folder that has one, and describes a tokenizer.model that nothing describes.

    Raises:
        CheckpointError: none has one.
    """
    folder = tokenizer_folder(folders)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if not (target / JSON).is_file() and not (target / CONFIG).is_file():
        write_json(target / CONFIG, LLAMA)


def tokenizer_folder(folders: Sequence[Path]) -> Path:
    """The first folder with a tokenizer.

    Raises:
        CheckpointError: none has one.
    """
    folder = next((f for f in folders if (f / JSON).is_file() or (f / SENTENCE_PIECES).is_file()), None)
    if folder is None:
        raise CheckpointError(
            "no tokenizer found", where=", ".join(map(str, folders)),
            do=f"name the folder with {JSON} or {SENTENCE_PIECES} as --tokenizer",
        )  # fmt: skip
    return folder


def next_free(folder: Path) -> int:
    """The first id that the tokenizer in `folder` gives to nothing."""
    added = read_special_tokens(folder).added.values()
    return max([open_tokenizer(folder).vocab_size, *(i + 1 for i in added)])


def needs_padding(folder: Path) -> bool:
    """Whether the tokenizer has no token for padding and none for unknown text that could stand in (LLaMA-3's)."""
    said = read_special_tokens(folder)
    return said.pad is None and said.unk is None


def add_tokens(folder: Path, tokens: Mapping[str, int], **settings: object) -> None:
    """Adds special `tokens` (name -> id, in the order of their ids) to the tokenizer's files in `folder`, and
    `settings` to its tokenizer_config.json."""
    said = read_special_tokens(folder)
    config = _read(folder / CONFIG)
    decoder = config.get("added_tokens_decoder")
    config["added_tokens_decoder"] = (decoder if isinstance(decoder, dict) else {}) | {
        str(i): _described(name) for name, i in tokens.items()
    }
    if said.pad is None:
        config["pad_token"] = PAD if PAD in tokens else said.unk
    write_json(folder / CONFIG, config | settings)
    if (folder / JSON).is_file():
        content = _read(folder / JSON)
        content["added_tokens"] = [
            *content.get("added_tokens", ()),
            *({"id": i, **_described(n)} for n, i in tokens.items()),
        ]
        write_json(folder / JSON, content)
    if (folder / ADDED).is_file() or not (folder / JSON).is_file():
        listed = _read(folder / ADDED) if (folder / ADDED).is_file() else {}
        write_json(folder / ADDED, {**listed, **tokens})


def begins_texts(folder: Path) -> bool:
    """Whether texts begin with a token of their own."""
    return open_tokenizer(folder).bos_id is not None


def puts_space_before(folder: Path) -> bool:
    """Whether the tokenizer puts a space before a text, and none behind a special token unless one is written: what
    transformers' LlamaTokenizer does, whichever file it reads. (A tokenizer.json of another class that prepends to each
    chunk needs no help.)"""
    if _read(folder / CONFIG).get("tokenizer_class") in LLAMA_CLASSES or not (folder / JSON).is_file():
        return True
    return _has_metaspace(_read(folder / JSON).get("pre_tokenizer"))


def _has_metaspace(pre_tokenizer: object) -> bool:
    """Whether this step of a tokenizer.json, or one within it, is sentencepiece's treatment of spaces."""
    if not isinstance(pre_tokenizer, dict):
        return False
    within = pre_tokenizer.get("pretokenizers")
    return pre_tokenizer.get("type") == "Metaspace" or any(
        _has_metaspace(step) for step in (within if isinstance(within, list) else [])
    )


def _described(name: str) -> dict[str, object]:
    return {
        "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
