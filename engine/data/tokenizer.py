"""Text to token ids and back: what every tokenizer offers, and how the one of a folder is found.

Two kinds of file are read: sentencepiece's tokenizer.model (LLaMA-1, LLaMA-2, Vicuna; sentence_pieces.py) and
tokenizer.json of Hugging Face's tokenizers (LLaMA-3, Phi, StableLM; json_tokenizer.py). What they put nowhere, which
token ends a text or whether one begins it, stands in the small files beside them (special_tokens.py).

A special token's name in a text is two things. Where a person wrote `</s>`, it is four characters: `encode`. Where a
conversation template did, it is the token: `encode_template`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from engine.data.special_tokens import read_special_tokens
from engine.errors import CheckpointError, DataError

SENTENCE_PIECES = "tokenizer.model"
JSON = "tokenizer.json"
NO_TOKEN = "\ufffd"  # the text of an id that no token has


class Tokenizer(ABC):
    """A tokenizer read from `path`.

    Attributes:
        vocab_size: tokens, added ones included: transformers' len(tokenizer).
        bos_id: the token that it puts before a text; None where it puts none (Phi, StableLM).
        eos_id: the token that ends an answer.
        stop_ids: others that end one, as the model's configuration says (LLaMA-3-Instruct has two, Phi-3 three).
        pad_id: the token named for padding, else the unknown one, else None. Packs hold no padding; it is what other
            projects' files and labels mean by it.
        unk_id: what stands for text that the vocabulary cannot say; None where there is none.
    """

    path: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None
    unk_id: int | None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, as people wrote it: names of special tokens in it (`<s>`, `<|eot_id|>`) are plain text.
        Where there is no begin token, `bos` puts none.

        Raises:
            DataError: the text is not valid Unicode (a lone surrogate).
        """
        return self._between(self._plain(_valid(text)), bos, eos)

    def encode_template(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a template's text: names of special tokens in it are these tokens. Errors as `encode`."""
        return self._between(self._with_special(_valid(text)), bos, eos)

    def _between(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        first = [self.bos_id] if bos and self.bos_id is not None else []
        return first + ids + [self.eos_id] * eos

    @abstractmethod
    def _plain(self, text: str) -> list[int]: ...

    @abstractmethod
    def _with_special(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens vanish.

        Raises:
            ValueError: an id that no token can have.
        """

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where the vocabulary does not have it."""

    @abstractmethod
    def name_of(self, token: int) -> str:
        """The name of a token that there is: `</s>`."""

    @abstractmethod
    def require_vocab(self, model_vocab: int, model: str = "") -> None:
        """Checks that this tokenizer belongs to a model with `model_vocab` embeddings.

        Raises:
            DataError: it cannot.
        """


def open_tokenizer(path: str | Path, *, eos: str = "", pad: str = "") -> Tokenizer:
    """The tokenizer of a folder or a file. `eos` and `pad` name other tokens for these parts than the files do, and
    add them to the vocabulary where it does not have them (Imp's `</s>`, LLaMA-3's `<pad>`).

    Of a folder with both files it is tokenizer.json, except where that has the very tokens of the sentencepiece model
    and of the list of added ones (LLaMA-1, LLaMA-2, Vicuna, transformers' LLaVA of them): these were trained with
    sentencepiece's white space, which their tokenizer.json gives only in part. A folder with neither, as Meta's are,
    may have the file beside it.

    Raises:
        CheckpointError: there is no tokenizer.
        DataError: a file is of another kind or damaged.
        EnvironmentProblem: the library that reads it is not installed.
    """
    path = Path(path)
    pieces, file = _find(path)
    if file is None or pieces is None:
        return _open(_existing(pieces or file, path), eos, pad)
    first, second = _open(pieces, "", ""), _open(file, eos, pad)
    is_llamas = first.vocab_size == second.vocab_size and not read_special_tokens(pieces.parent).trims
    return _open(pieces, eos, pad) if is_llamas else second


def _find(path: Path) -> tuple[Path | None, Path | None]:
    """-> (a sentencepiece model, a tokenizer.json) at this path."""
    if not path.is_dir():
        return (None, path) if path.suffix == ".json" else (path, None)
    for folder in (path, path.parent):
        pieces, file = folder / SENTENCE_PIECES, folder / JSON
        if pieces.is_file() or file.is_file():
            return (pieces if pieces.is_file() else None), (file if file.is_file() else None)
    return None, None


def _existing(file: Path | None, asked: Path) -> Path:
    if file is not None and file.is_file():
        return file
    only = " (vocab.json and merges.txt are not enough)" if (asked / "merges.txt").is_file() else ""
    raise CheckpointError(
        "no tokenizer found",
        where=f"{asked} and {asked.parent}" if asked.is_dir() else str(asked),
        why=f"neither {SENTENCE_PIECES} nor {JSON} is there{only}" if asked.is_dir() else "there is no such file",
        do="pass the model's tokenizer.model or tokenizer.json, or the folder that holds it, as --model.tokenizer",
    )


def _open(file: Path, eos: str, pad: str) -> Tokenizer:
    if file.suffix == ".json":
        from engine.data.json_tokenizer import JsonTokenizer

        return JsonTokenizer(file, eos=eos, pad=pad)
    from engine.data.sentence_pieces import SentencePieces

    return SentencePieces(file, eos=eos, pad=pad)


def read_bytes(path: Path) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            "the tokenizer cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            do="name a tokenizer.model or tokenizer.json with --model.tokenizer",
        ) from error
    if not content:
        raise DataError("the tokenizer is an empty file", where=str(path), do="copy it again")
    return content


def two_ids(name: str, found: object, beside: int, path: str) -> DataError:
    """The error of a token that its tokenizer's file and the files beside that tell differently."""
    return DataError(
        f"token {name!r} has two ids", where=path,
        why=f"{found} in {Path(path).name}, {beside} in the files beside it",
        do="take all files of the tokenizer from one model",
    )  # fmt: skip


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is not valid Unicode: {error.object[error.start]!r} at character {error.start}",
            do="repair the row: half of a surrogate pair was cut off",
        ) from error
    return text
