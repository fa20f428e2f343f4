"""tokenizer.json files like those of Phi, LLaMA-3 and StableLM, tiny, against transformers' tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.data.json_tokenizer import JsonTokenizer
from engine.data.layout import Layout
from engine.data.preview import describe
from engine.data.sentence_pieces import SentencePieces
from engine.data.tokenizer import Tokenizer, open_tokenizer
from engine.errors import CheckpointError, DataError
from tests.engine.data.conftest import SENTENCES

TEXTS = [
    "Question: Which of these?", "two  spaces and\n\nlines\t", "\u00e4\u6f22\U0001f600", "", " lead",
    "a <|eot_id|> typed", "USER: hi</s>USER: <|endoftext|>x",
]  # fmt: skip
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def byte_level(special: list[str]) -> Any:
    """A byte-level BPE as GPT-2's, of a few hundred tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    library.add_special_tokens(special)
    return library


def phi(folder: Path) -> None:
    """As Phi-2's: no begin token, the end is also the unknown token, white space was added."""
    library = byte_level(["<|endoftext|>"])
    library.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write(folder, library, {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None, **names})


def llama_3(folder: Path) -> None:
    """A begin token by the post-processor, and neither padding nor unknown token."""
    library = byte_level(LLAMA_3)
    begin = LLAMA_3[0]
    library.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, library.token_to_id(begin))]
    )
    names = {"bos_token": begin, "eos_token": "<|eot_id|>"}
    write(folder, library, {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def stablelm(folder: Path) -> None:
    """NFC, names in special_tokens_map.json as objects."""
    library = byte_level(["<|endoftext|>", "<|pad|>"])
    library.normalizer = normalizers.NFC()
    write(folder, library, {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": "<|pad|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def write(folder: Path, library: Any, config: dict[str, Any]) -> None:
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("make", [phi, llama_3, stablelm])
def test_ids_are_those_of_transformers(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    ours = open_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert isinstance(ours, JsonTokenizer) and ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    for text in TEXTS:
        assert ours.encode_template(text, bos=True) == theirs(text).input_ids
        assert ours.encode_template(text) == theirs(text, add_special_tokens=False).input_ids
        plain = ours.encode(text, bos=True, eos=True)
        begin = [] if ours.bos_id is None else [ours.bos_id]
        typed = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert plain == [*begin, *typed, ours.eos_id]
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True) == text


def test_the_parts_that_tokens_play(tmp_path: Path) -> None:
    found: dict[str, Tokenizer] = {}
    for make in (phi, llama_3, stablelm):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder)
        found[make.__name__] = open_tokenizer(folder / "tokenizer.json")
    end = found["phi"].id_of("<|endoftext|>")
    assert (found["phi"].bos_id, found["phi"].eos_id, found["phi"].pad_id, found["phi"].unk_id) == (None, end, end, end)
    three = found["llama_3"]
    assert (three.bos_id, three.pad_id, three.unk_id) == (three.id_of("<|begin_of_text|>"), None, None)
    assert three.eos_id == three.id_of("<|eot_id|>") and three.id_of("no such") is None
    stable = found["stablelm"]
    assert (stable.bos_id, stable.pad_id) == (None, stable.id_of("<|pad|>"))


def test_a_model_may_end_its_answers_in_several_ways(tmp_path: Path) -> None:
    llama_3(tmp_path)
    plain = open_tokenizer(tmp_path)
    assert plain.stop_ids == ()
    end = plain.id_of("<|end_of_text|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, plain.eos_id]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))  # what generates counts
    both = open_tokenizer(tmp_path)
    assert (both.eos_id, both.stop_ids) == (plain.eos_id, (end,))


def test_names_of_special_tokens_are_text_where_people_write_them(tmp_path: Path) -> None:
    llama_3(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    eot = tokenizer.id_of("<|eot_id|>")
    assert (
        eot not in tokenizer.encode("a<|eot_id|>") and tokenizer.decode(tokenizer.encode("<|eot_id|>")) == "<|eot_id|>"
    )
    assert tokenizer.encode_template("a<|eot_id|>")[-1] == eot


def test_tokens_are_added_at_the_end(tmp_path: Path) -> None:
    phi(tmp_path)
    plain = open_tokenizer(tmp_path)
    imp = open_tokenizer(tmp_path, eos="</s>")
    assert (imp.eos_id, imp.vocab_size) == (plain.vocab_size, plain.vocab_size + 1)
    assert imp.encode_template("yes.</s>") == [*plain.encode("yes."), imp.eos_id] == imp.encode("yes.", eos=True)
    assert imp.encode("</s>") == plain.encode("</s>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": plain.vocab_size}))  # as a folder of Imp's says it
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_tokenizer(tmp_path).eos_id == imp.eos_id
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": 7}))
    with pytest.raises(DataError, match="'</s>' has two ids"):
        open_tokenizer(tmp_path)


def test_a_model_may_have_more_rows_and_never_fewer(tmp_path: Path) -> None:
    phi(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    size = tokenizer.vocab_size
    tokenizer.require_vocab(size)
    tokenizer.require_vocab(size + 900)
    with pytest.raises(
        DataError, match=f"wrong tokenizer: it has {size} tokens, the language model {size - 1}"
    ) as caught:
        tokenizer.require_vocab(size - 1, "W/phi-2")
    assert "W/phi-2" in caught.value.where and "--model.tokenizer" in caught.value.do
    assert tokenizer.decode([*tokenizer.encode("ab"), size + 5, *tokenizer.encode("c")]) == "ab\ufffdc"
    with pytest.raises(ValueError, match="-200 is negative"):
        tokenizer.decode([-200])
    with pytest.raises(DataError, match="character 1"):
        tokenizer.encode("a\ud800")


def test_files_that_do_not_say_enough(tmp_path: Path) -> None:
    phi(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="which token ends a text"):
        open_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert open_tokenizer(tmp_path).eos_id == 5
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match="must hold an object"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "add_bos_token": True}))
    assert open_tokenizer(tmp_path).bos_id is None  # it names none
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match="are not enough"):
        open_tokenizer(tmp_path)


def test_sentencepiece_wins_where_both_have_the_same_tokens(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = tmp_path / "weights" / "7B"
    folder.mkdir(parents=True)
    (tmp_path / "weights" / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert isinstance(open_tokenizer(folder), SentencePieces)  # Meta's layout: in the folder above
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    size = open_tokenizer(folder).vocab_size
    for more in (0, 11):  # as many tokens as pieces (LLaMA), or 11 more (Phi-3)
        library = tokenizers.Tokenizer(models.BPE(vocab={f"t{i}": i for i in range(size + more)}, merges=[]))
        write(folder, library, {"eos_token": "t2"})
        assert isinstance(open_tokenizer(folder), JsonTokenizer if more else SentencePieces)


def test_lavins_layout_without_a_begin_token(tmp_path: Path) -> None:
    phi(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    layout = Layout(tokenizer, image_tokens=3, modality=False)
    sample = layout.pair("x", "Question:", "The answer is A.", "/a.png")
    head = tokenizer.encode("Image: ")
    assert sample.input_ids[: len(head) + 3] == [*head, 0, 0, 0] and sample.image_slots[0] == len(head)
    assert sample.labels[-1] == sample.input_ids[-1] == tokenizer.eos_id  # though it is the unknown token, too
    assert describe(sample, tokenizer).endswith("target | The answer is A.<|endoftext|>")
    assert len(Layout(tokenizer, 60, modality=False).pair("x", "Question:" * 50, "A.").input_ids) == 60
    assert len(Layout(tokenizer, 60).pair("x", "Question:" * 50, "A.").input_ids) == 59
