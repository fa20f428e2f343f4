"""A tokenizer.json of Hugging Face's tokenizers (LLaMA-3, Phi, StableLM, and what else has one)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.special_tokens import SpecialTokens, read_special_tokens
from engine.data.tokenizer import NO_TOKEN, Tokenizer, read_bytes, two_ids
from engine.errors import DataError, EnvironmentProblem


class JsonTokenizer(Tokenizer):
    """A tokenizer.json read from `path`, and the files beside it. `eos` and `pad`: tokens for these parts other than
    the files name; what the vocabulary does not have is added to it.

    Raises:
        DataError: the file is missing or no tokenizer.json, or nothing says which token ends a text.
        EnvironmentProblem: tokenizers is not installed.
    """

    def __init__(self, path: str | Path, *, eos: str = "", pad: str = "") -> None:
        self.path = str(path)
        special = read_special_tokens(Path(path).parent)
        content = read_bytes(Path(path))
        # tokenizers splits at special tokens or does not, once and for all threads: one of each
        self._library, self._template = (_load(content, self.path) for _ in range(2))
        for library in (self._library, self._template):
            _add_missing(library, special, [name for name in (eos, pad) if name], self.path)
        self._library.encode_special_tokens = True
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self._rows = 1 + max(vocabulary.values())
        self.unk_id = self._id(special.unk)
        self.eos_id = self._end(eos or special.eos, next(iter(special.eos_ids), None))
        self.stop_ids = tuple(i for i in special.eos_ids if i != self.eos_id)
        padding = self._id(pad or special.pad)
        self.pad_id = self.unk_id if padding is None else padding
        self.bos_id = self._begin(special)

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self.id_of(name)

    def _end(self, name: str | None, number: int | None) -> int:
        found = self._id(name)
        found = number if found is None else found
        if found is None:
            raise DataError(
                "nothing says which token ends a text",
                where=self.path,
                why="eos_token is in neither tokenizer_config.json nor special_tokens_map.json beside it, nor "
                "eos_token_id in config.json",
                do="put tokenizer_config.json of the model beside tokenizer.json",
            )
        return found

    def _begin(self, special: SpecialTokens) -> int | None:
        """What the files say, else what the post-processor puts before a text."""
        if special.add_bos is not None:
            return self._id(special.bos) if special.add_bos else None
        text, whole = (self._library.encode("x", add_special_tokens=special).ids for special in (False, True))
        return None if whole[: len(text)] == text else int(whole[0])

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _with_special(self, text: str) -> list[int]:
        ids: list[int] = self._template.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids of rows that the model has beyond the tokens (51,200 of Phi-2, 50,295 tokens) are U+FFFD each."""
        parts, run = [], []
        for i in ids:
            if i < 0:
                raise ValueError(f"token id {i} is negative")
            if i < self._rows:
                run.append(i)
            else:
                parts += [self._library.decode(run), NO_TOKEN]
                run = []
        return "".join([*parts, self._library.decode(run)])

    def id_of(self, token: str) -> int | None:
        found: int | None = self._library.token_to_id(token)
        return found

    def name_of(self, token: int) -> str:
        found: str = self._library.id_to_token(token)
        return found

    def require_vocab(self, model_vocab: int, model: str = "") -> None:
        """A model may have more rows than there are tokens: Phi-2 51,200 for 50,295, StableLM-2 100,352 for 100,289,
        Phi-3 32,064 for 32,011."""
        if model_vocab < self._rows:
            raise DataError(
                f"wrong tokenizer: it has {self._rows} tokens, the language model {model_vocab} embeddings",
                where=f"{self.path}{f' and {model}' if model else ''}",
                why=f"tokens {model_vocab} to {self._rows - 1} would have no embedding",
                do="give the model's own file with --model.tokenizer, or a model whose embeddings were resized to it",
            )


def _load(content: bytes, path: str) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise EnvironmentProblem("tokenizers is not installed", why=str(error), do="pip install tokenizers") from error
    try:
        library = Library.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        pointer = " (a git-lfs pointer)" if content.startswith(b"version https://git-lfs") else ""
        raise DataError(
            "the tokenizer is not a tokenizer.json",
            where=path,
            why=f"it has {len(content)} bytes and starts with {content[:24]!r}{pointer}: {error}",
            do="give the tokenizer.json that came with the language model's weights",
        ) from error
    library.no_padding()
    library.no_truncation()
    return library


def _add_missing(library: Any, special: SpecialTokens, wanted: Sequence[str], path: str) -> None:
    """Adds what the files beside tokenizer.json list and it does not have, then `wanted`, at the end."""
    from tokenizers import AddedToken

    for name, number in sorted(special.added.items(), key=lambda entry: entry[1]):
        if library.token_to_id(name) is None:
            library.add_tokens([AddedToken(name, special=name in special.special, normalized=False)])
        if library.token_to_id(name) != number:
            raise two_ids(name, library.token_to_id(name), number, path)
    for name in wanted:
        if library.token_to_id(name) is None:
            library.add_special_tokens([AddedToken(name, special=True, normalized=False)])
