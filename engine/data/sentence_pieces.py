"""A sentencepiece model (tokenizer.model of LLaMA-1, LLaMA-2 and Vicuna).

sentencepiece puts a space before a text, so its first word is a piece like any other word. After a special
token in a template's text there are two customs, and tokenizer_config.json says which a model was trained with:
`"legacy": false` (Vicuna v1.5) puts no space there, so `</s>USER` is 2, 11889; else, as always before, it does: 2, 3148
(` US`), 1001 (`ER`).

A sentencepiece model takes no more pieces. Tokens that were added to it (<image>, <pad>) stand in the files beside it,
with ids behind its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.special_tokens import read_special_tokens
from engine.data.tokenizer import NO_TOKEN, Tokenizer, read_bytes, two_ids
from engine.errors import DataError, EnvironmentProblem

logger = logging.getLogger("nibble")

# Protocol buffers that are joined are merged: this one says normalizer_spec.add_dummy_prefix = false, and no more.
_NO_SPACE_BEFORE = b"\x1a\x02\x18\x00"
MOST_SPARE = 1024  # rows of an embedding that are nobody's: as many as padding comes to, less than another vocabulary
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
        special = read_special_tokens(Path(path).parent)
        self._model = _load(content, self.path)
        self._inner = self._model if special.legacy is not False else _load(content + _NO_SPACE_BEFORE, self.path)
        self.num_pieces: int = self._model.vocab_size()
        self._added = self._behind_pieces(special.added)
        self._names = {i: name for name, i in self._added.items()}
        self.vocab_size = self.num_pieces + len(self._added)
        self._rows = 1 + max(self._names, default=self.num_pieces - 1)
        self.bos_id: int = self._model.bos_id()
        self.eos_id = self._named(eos) if eos else self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                "the tokenizer has no begin or no end token",
                where=self.path,
                why=f"bos is {self.bos_id}, eos is {self.eos_id}; both are part of the layout",
                do=_BESIDE,
            )
        self.stop_ids = tuple(i for i in special.eos_ids if i != self.eos_id)
        self.unk_id = self._model.unk_id()
        padding = self.id_of(special.pad) if special.pad else None
        self.pad_id = self._named(pad) if pad else self.unk_id if padding is None else padding
        named = (i for i in range(self.num_pieces) if self._model.is_control(i) or self._model.is_unknown(i))
        words = {name: i for name, i in self._added.items() if name not in special.special}
        self._words = _NamedTokens(words)
        self._special = _NamedTokens({self._model.id_to_piece(i): i for i in named} | self._added)
        self._silent = frozenset(self._names) - frozenset(words.values())

    def _behind_pieces(self, added: Mapping[str, int]) -> dict[str, int]:
        """The tokens of `added` that are no pieces."""
        for name, i in added.items():
            piece = self._piece(name)
            if i != piece and (piece is not None or i < self.num_pieces):
                found = self._model.id_to_piece(i) if piece is None else piece
                raise two_ids(name, found, i, self.path)
        return {name: i for name, i in added.items() if i >= self.num_pieces}

    def _named(self, piece: str) -> int:
        found = self.id_of(piece)
        if found is None:
            raise DataError(
                f"the tokenizer has no piece {piece!r}", where=self.path,
                why="a sentencepiece model takes no more pieces", do="use the model's tokenizer.json",
            )  # fmt: skip
        return found

    def _plain(self, text: str) -> list[int]:
        return self._around(self._words, text)

    def _with_special(self, text: str) -> list[int]:
        return self._around(self._special, text)

    def _around(self, named: _NamedTokens, text: str) -> list[int]:
        """Ids of `text`, in which the names of these tokens are the tokens."""
        parts = named.split(text)  # text and names in turn
        ids: list[int] = self._model.encode(parts[0])
        for name, after in zip(parts[1::2], parts[2::2], strict=True):
            ids += [named.ids[name], *self._inner.encode(after)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids of rows that the model has beyond the tokens (of padding) are U+FFFD each."""
        parts, run = [], list[int]()
        for i in ids:
            if i < 0:
                raise ValueError(f"token id {i} is negative")
            if i < self.num_pieces:
                run.append(i)
            elif i not in self._silent:
                parts += [self._model.decode(run), self._names.get(i, NO_TOKEN)]
                run = []
        return "".join([*parts, self._model.decode(run)])

    def _piece(self, token: str) -> int | None:
        found: int = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None  # unknown ones have the id of <unk>

    def id_of(self, token: str) -> int | None:
        return self._added[token] if token in self._added else self._piece(token)

    def name_of(self, token: int) -> str:
        if token in self._names:
            return self._names[token]
        found: str = self._model.id_to_piece(token)
        return found

    def require_vocab(self, model_vocab: int, model: str = "") -> None:
        """A row of the embedding for each token, and not many more: Vicuna-7B v0 has one for its [PAD], transformers'
        LLaVA fills up to a multiple of 64. (An added token may have none: a Llama-2 is spread with 32,000 rows and
        <pad> as 32000, which no text has.)"""
        if not self.num_pieces <= model_vocab < self._rows + MOST_SPARE:
            raise DataError(
                f"wrong tokenizer: it has {self.vocab_size} pieces, the language model {model_vocab} embeddings",
                where=f"{self.path}{f' and {model}' if model else ''}",
                why="ids would name other words than the model learnt",
                do="give the model's own file with --model.tokenizer",
            )
        spare = model_vocab - self._rows
        if spare > 0:
            logger.warning(
                "%d of the language model's %d embeddings belong to no token of %s: filling, or it is another model's",
                spare, model_vocab, self.path,
            )  # fmt: skip


class _NamedTokens:
    """Tokens that a text may name."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if ids else None

    def split(self, text: str) -> list[str]:
        """Text and names in turn, text first and last."""
        return [text] if self._pattern is None else self._pattern.split(text)


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
