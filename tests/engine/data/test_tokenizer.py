from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from engine.data.json_tokenizer import JsonTokenizer
from engine.data.sentence_pieces import SentencePieces
from engine.data.tokenizer import Tokenizer, open_tokenizer
from engine.errors import CheckpointError, DataError


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
        open_tokenizer(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.model", tmp_path / "nothing.json", tmp_path):
        with pytest.raises(CheckpointError, match="no tokenizer found") as caught:
            open_tokenizer(path)
        assert str(path) in caught.value.where and "--model.tokenizer" in caught.value.do


def test_wrong_tokenizer_names_both_sizes(tokenizer: Tokenizer) -> None:
    tokenizer.require_vocab(400)
    with pytest.raises(DataError, match="wrong tokenizer: it has 400 pieces, the language model 32000"):
        tokenizer.require_vocab(32000)


def test_a_lone_surrogate_and_an_unknown_id(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 3"):
        tokenizer.encode("abc\ud800")
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tokenizer.decode([5, -1])
    ids = tokenizer.encode("Maps")
    assert tokenizer.decode([*ids, 400, *ids]) == "Maps\ufffdMaps"  # a row of the model that is no token


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
GOLDEN = [
    [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892, 13173,
     29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871],
    [29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901, 319, 6635, 29889, 2, 11889, 29901, 3750, 29973,
     319, 1799, 9047, 13566, 29901, 7311, 29889, 2],
]  # fmt: skip


def test_vicunas_template_has_llavas_ids(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The two chunks of a conversation around its image, as Vicuna v1.5's tokenizer_config.json asks for."""
    (tmp_path / "tokenizer.model").write_bytes(Path(llama_tokenizer.path).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false, "pad_token": "<unk>"}')
    tokenizer = open_tokenizer(tmp_path)
    chunks = [f"{SYSTEM} USER: ", "\nWhat is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT: Because.</s>"]
    found = [tokenizer.encode_template(chunk, bos=n == 0) for n, chunk in enumerate(chunks)]
    assert found == GOLDEN and tokenizer.pad_id == 0
    assert llama_tokenizer.encode_template(chunks[1])[14:18] == [2, 3148, 1001, 29901]  # as LLaMA-1 was trained


def test_special_names_are_tokens_in_templates_only(tokenizer: Tokenizer) -> None:
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.encode_template("<s>Question</s>") == [begin, *tokenizer.encode("Question"), end]
    assert tokenizer.encode_template("") == [] and tokenizer.encode_template("</s>") == [end]
    assert end not in tokenizer.encode("Question</s>")
    assert (tokenizer.id_of("</s>"), tokenizer.id_of("no such piece")) == (end, None)


def test_white_space_behind_a_special_token(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    old = open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    new = open_tokenizer(tmp_path)
    assert old.encode_template("a</s>Maps") == [*old.encode("a"), old.eos_id, *old.encode("Maps")]
    assert new.encode_template("a</s> Maps") == old.encode_template("a</s>Maps") != new.encode_template("a</s>Maps")
    assert new.encode(" Maps") == old.encode(" Maps")
    with pytest.raises(DataError, match="no piece '<pad>'"):
        open_tokenizer(tmp_path, pad="<pad>")


def test_tiktokens_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match="tiktoken's list") as caught:
        open_tokenizer(tmp_path)
    assert "tokenizer.json" in caught.value.do


def test_tokens_added_to_a_sentencepiece_model(
    tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As our own export of transformers' LLaVA leaves them: <pad> by the list, <image> by its description too."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 400, "<image>": 401, "word": 402}')
    described = {"1": {"content": "<s>", "special": True}, "401": {"content": "<image>", "special": True}}
    said = {"legacy": False, "pad_token": "<pad>", "added_tokens_decoder": described}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.id_of("<image>")) == (403, 400, 401)
    assert tokenizer.name_of(401) == "<image>" and tokenizer.id_of("<s>") == tokenizer.bos_id == 1
    maps = tokenizer.encode("Maps")
    assert tokenizer.encode_template("Maps<image>") == [*maps, 401]
    assert 401 not in tokenizer.encode("Maps<image>") and tokenizer.encode("Mapsword")[-1] == 402
    assert tokenizer.decode([400, *maps, 401, 402]) == "Mapsword"
    for rows in (400, 403, 448, 512):
        caplog.clear()
        tokenizer.require_vocab(rows)
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [message.split(" of ")[0] for message in warned] == ([str(rows - 403)] if rows > 403 else [])
    for rows in (399, 403 + 1024):
        with pytest.raises(DataError, match=f"wrong tokenizer: it has 403 pieces, the language model {rows} embed"):
            tokenizer.require_vocab(rows)
    for wrong in ({"<image>": 399}, {"</s>": 403}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="has two ids"):
            open_tokenizer(tmp_path)


def test_which_of_two_files_counts_where_tokens_were_added(tokenizer_path: Path, tmp_path: Path) -> None:
    """Vicuna's with <image> stays sentencepiece's; Phi-3's, whose tokens take the white space behind them, is not."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    pieces = open_tokenizer(tmp_path)
    names = {pieces.name_of(i): i for i in range(pieces.vocab_size)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(names, [], unk_token="<unk>"))
    library.add_special_tokens(["<image>"])
    library.save(str(tmp_path / "tokenizer.json"))
    for trims, kind in ((False, SentencePieces), (True, JsonTokenizer)):
        image = {"content": "<image>", "special": True, "rstrip": trims}
        said = {"eos_token": "</s>", "added_tokens_decoder": {"400": image}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        found = open_tokenizer(tmp_path)
        assert isinstance(found, kind) and found.vocab_size == 401 and found.id_of("<image>") == 400
