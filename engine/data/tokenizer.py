"""Text to token ids and back, by a sentencepiece model (LLaMA's tokenizer.model)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import DataError, EnvironmentProblem


class Tokenizer:
    """A sentencepiece model read from `path`.

    Raises:
        DataError: the file is missing, is no sentencepiece model, or has no begin or end token.
        EnvironmentProblem: sentencepiece is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise EnvironmentProblem(
                "sentencepiece is not installed", why=str(error), do="pip install sentencepiece"
            ) from error
        self.path = str(path)
        content = _read(Path(path))
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            why = f"it has {len(content)} bytes and starts with {content[:24]!r}"
            raise DataError(
                "the tokenizer is not a sentencepiece model",
                where=self.path,
                why=why + (" (a git-lfs pointer)" if content.startswith(b"version https://git-lfs") else ""),
                do="give the tokenizer.model that came with the language model's weights",
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                "the tokenizer has no begin or no end token",
                where=self.path,
                why=f"bos is {self.bos_id}, eos is {self.eos_id}; both are part of LaVIN's layout",
                do="give the tokenizer.model that came with the language model's weights",
            )

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`. Names of control tokens in it (`<s>`, `</s>`) are plain text.

        Raises:
            DataError: the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text is not valid Unicode: {error.object[error.start]!r} at character {error.start}",
                do="repair the row: half of a surrogate pair was cut off",
            ) from error
        ids: list[int] = self._model.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens vanish.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        text: str = self._model.decode(list(ids))
        return text

    def require_vocab(self, model_vocab: int, model: str = "") -> None:
        """Checks that this tokenizer belongs to a model with `model_vocab` embeddings.

        Raises:
            DataError: the sizes differ.
        """
        if model_vocab != self.vocab_size:
            raise DataError(
                f"wrong tokenizer: it has {self.vocab_size} pieces, the language model {model_vocab} embeddings",
                where=f"{self.path}{f' and {model}' if model else ''}",
                why="ids would name other words than the model learnt",
                do="give the model's own file with --model.tokenizer",
            )


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            "the tokenizer cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            do="name a sentencepiece tokenizer.model with --model.tokenizer",
        ) from error
    if not content:
        raise DataError("the tokenizer is an empty file", where=str(path), do="copy it again")
    return content
