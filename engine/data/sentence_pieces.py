"""A sentencepiece model (tokenizer.model of LLaMA-1, LLaMA-2 and Vicuna).

sentencepiece puts a space before a text, so its first word is a piece like any other word. After a special
token in a template's text there are two customs, and tokenizer_config.json says which a model was trained with:
`"legacy": false` (Vicuna v1.5) puts no space there, so `</s>USER` is 2, 11889; else, as always before, it does: 2, 3148
(` US`), 1001 (`ER`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.special_tokens import read_special_tokens
from engine.data.tokenizer import Tokenizer, read_bytes
from engine.errors import DataError, EnvironmentProblem

# Protocol buffers that are joined are merged: this one says normalizer_spec.add_dummy_prefix = false, and no more.
_NO_SPACE_BEFORE = b"\x1a\x02\x18\x00"
_BESIDE = "give the tokenizer.model that came with the language model's weights"


class SentencePieces(Tokenizer):
    """A sentencepiece model read from `path`. `eos` and `pad`: pieces for these parts other than the files name.

    Raises:
        DataError: the file is missing, is no sentencepiece model, or has no begin or end token.
        EnvironmentProblem: sentencepiece is not installed.
    """

    def __init__(self, path: str | Path, *, eos: str = "", pad: str = "") -> None:
        self.path = str(path)
        content = read_bytes(Path(path))
        said = read_special_tokens(Path(path).parent)
        self._model = _load(content, self.path)
        self._inner = self._model if said.legacy is not False else _load(content + _NO_SPACE_BEFORE, self.path)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id = self._named(eos) if eos else self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                "the tokenizer has no begin or no end token",
                where=self.path,
                why=f"bos is {self.bos_id}, eos is {self.eos_id}; both are part of the layout",
                do=_BESIDE,
            )
        self.stop_ids = tuple(i for i in said.eos_ids if i != self.eos_id)
        self.unk_id = self._model.unk_id()
        padding = self.id_of(said.pad) if said.pad else None
        self.pad_id = self._named(pad) if pad else self.unk_id if padding is None else padding
        special = (i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i))
        self._special = {self._model.id_to_piece(i): i for i in special}
        self._split = re.compile(f"({'|'.join(map(re.escape, self._special))})")

    def _named(self, piece: str) -> int:
        found = self.id_of(piece)
        if found is None:
            raise DataError(
                f"the tokenizer has no piece {piece!r}", where=self.path,
                why="a sentencepiece model takes no more pieces", do="use the model's tokenizer.json",
            )  # fmt: skip
        return found

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def _with_special(self, text: str) -> list[int]:
        parts = self._split.split(text)  # text and names in turn
        ids = self._plain(parts[0])
        for name, after in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self._special[name], *self._inner.encode(after)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        text: str = self._model.decode(list(ids))
        return text

    def id_of(self, token: str) -> int | None:
        found: int = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None  # unknown ones have the id of <unk>

    def name_of(self, token: int) -> str:
        found: str = self._model.id_to_piece(token)
        return found

    def require_vocab(self, model_vocab: int, model: str = "") -> None:
        """LLaMA's embeddings are as many as the model has pieces."""
        if model_vocab != self.vocab_size:
            raise DataError(
                f"wrong tokenizer: it has {self.vocab_size} pieces, the language model {model_vocab} embeddings",
                where=f"{self.path}{f' and {model}' if model else ''}",
                why="ids would name other words than the model learnt",
                do="give the model's own file with --model.tokenizer",
            )


def _load(content: bytes, path: str) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise EnvironmentProblem(
            "sentencepiece is not installed", why=str(error), do="pip install sentencepiece"
        ) from error
    try:
        return SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(
            "the tokenizer is not a sentencepiece model",
            where=path,
            why=f"it has {len(content)} bytes and starts with {content[:24]!r}{_known(content)}",
            do=_BESIDE + "; of LLaMA-3, the tokenizer.json of the Hugging Face folder",
        ) from error


def _known(content: bytes) -> str:
    if content.startswith(b"version https://git-lfs"):
        return " (a git-lfs pointer)"
    return " (tiktoken's list, as Meta's LLaMA-3 has it)" if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content) else ""
