from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.tokenizer import Tokenizer
from engine.errors import DataError


def test_encode_adds_begin_and_end_only_when_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Question: why")
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert tokenizer.encode("Question: why", bos=True, eos=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]


@pytest.mark.parametrize(
    "text", ["Options: (A) cup", "two  spaces ", "line\nbreak\ttab", "\u00e4\u6f22\U0001f600", "<s></s>\0"]
)
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1


def test_llama_ids(llama_tokenizer: Tokenizer) -> None:
    assert (llama_tokenizer.vocab_size, llama_tokenizer.bos_id, llama_tokenizer.eos_id) == (32000, 1, 2)
    assert llama_tokenizer.encode("Image: ") == [7084, 29901, 29871]
    assert llama_tokenizer.encode("Image: N/A") == [7084, 29901, 405, 29914, 29909]
    for letter, token in zip("ABCDE", (319, 350, 315, 360, 382), strict=True):
        ids = llama_tokenizer.encode(f"Response:The answer is {letter}.")
        assert ids[-5:] == [1576, 1234, 338, token, 29889]


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"hello, world", "12 bytes"), (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"), (b"", "empty")],
)
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.model", tmp_path):
        with pytest.raises(DataError, match="cannot be read") as caught:
            Tokenizer(path)
        assert str(path) in caught.value.where


def test_wrong_tokenizer_names_both_sizes(tokenizer: Tokenizer) -> None:
    tokenizer.require_vocab(400)
    with pytest.raises(DataError, match="wrong tokenizer: it has 400 pieces, the language model 32000"):
        tokenizer.require_vocab(32000)


def test_a_lone_surrogate_and_an_unknown_id(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 3"):
        tokenizer.encode("abc\ud800")
    with pytest.raises(ValueError, match="token id 400 is outside"):
        tokenizer.decode([5, 400])
