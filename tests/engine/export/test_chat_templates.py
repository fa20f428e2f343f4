"""Chat templates write what training wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import engine.demo
from engine.chat import scienceqa_prompt
from engine.data.layout import Layout
from engine.data.rows import instruction
from engine.data.tokenizer import open_tokenizer
from engine.export.chat_templates import CONVERSATIONS, CURIOUS, LAVIN, jinja, template_name
from engine.export.tokenizer_files import (
    LLAMA,
    add_tokens,
    begins_texts,
    copy_tokenizer,
    next_free,
    puts_space_before,
)
from models.language.llama import LlamaConfig
from models.language.phi import PhiConfig

jinja2 = pytest.importorskip("jinja2")

DEMO = Path(engine.demo.__file__).parent / "tokenizer.model"
PREPENDS = {  # the normalizer of LLaMA's first tokenizer.json files
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
TALK = [
    {"role": "user", "content": [{"type": "text", "text": " What is this? "}, {"type": "image"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
]  # fmt: skip


def rendered(name: str, messages: list[dict[str, object]], *, asks: bool = False, **how: bool) -> str:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        jinja(name, begins=how.get("begins", True), spaced=how.get("spaced", False))
    )
    text: str = template.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=asks)
    return text


def test_vicuna() -> None:
    assert rendered("vicuna_v1", TALK, spaced=True) == (
        f"<s> {CURIOUS} USER: <image> \nWhat is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT: Because.</s>"
    )
    assert rendered("vicuna_v1", TALK[:1], asks=True) == f"<s>{CURIOUS} USER: <image>\nWhat is this? ASSISTANT:"


def test_a_picture_in_plain_text_and_another_system() -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat?"}]
    assert rendered("vicuna_v1", talk, spaced=True, asks=True) == "<s> Be brief. USER: <image> \nWhat? ASSISTANT:"


@pytest.mark.parametrize("kind", ["model", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_gives_the_ids_of_training(tmp_path: Path, legacy: bool, kind: str) -> None:
    """Training tokenized the chunks around an image apart; a server tokenizes the template's text as one. From a
    tokenizer.model, and from a tokenizer.json that prepends to each chunk, read by either class."""
    transformers = pytest.importorskip("transformers")
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    shutil.copyfile(DEMO, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"legacy": legacy}))
    ours = open_tokenizer(source)
    if kind != "model":
        converted = transformers.AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str()
        content = json.loads(converted) | {"normalizer": PREPENDS, "pre_tokenizer": None}
        source = tmp_path / "converted"
        source.mkdir()
        (source / "tokenizer.json").write_text(json.dumps(content))
        (source / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"legacy": legacy, "tokenizer_class": kind}))
    copy_tokenizer([source], target)
    image = next_free(source)
    add_tokens(target, {"<image>": image})
    assert begins_texts(target)

    first, second = f"{CURIOUS} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:".split(
        "<image>"
    )
    trained = [1, *ours.encode_template(first), image, *ours.encode_template(second)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    text = rendered("vicuna_v1", TALK[:3], spaced=puts_space_before(target), asks=True)
    got = tokenizer(text, add_special_tokens=False).input_ids
    if kind == "PreTrainedTokenizerFast" and not legacy:  # which gives </s> USER whatever legacy says
        got, trained = got[: got.index(2)], trained[: trained.index(2)]
    assert got == trained


@pytest.mark.parametrize(
    ("pre_tokenizer", "kind", "spaced"),
    [
        (None, "LlamaTokenizerFast", True),
        ({"type": "Metaspace"}, "PreTrainedTokenizerFast", True),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "Metaspace"}]}, "Other", True),
        ({"type": "Split", "pattern": {"String": "Metaspace"}}, "PreTrainedTokenizerFast", False),
        ({"type": "ByteLevel"}, "NoLlamaTokenizer", False),
        (None, None, False),
    ],
)
def test_what_puts_a_space_before_a_text(
    tmp_path: Path, pre_tokenizer: dict[str, object] | None, kind: str | None, spaced: bool
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": pre_tokenizer}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert puts_space_before(tmp_path) is spaced


def test_llama_3_has_one_begin_token() -> None:
    text = rendered("llava_llama_3", TALK[:2], asks=True)
    assert text.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision")
    assert text.endswith(
        "natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text.count("<s>") == 1


def test_bunny_and_imp() -> None:
    assert rendered("bunny", TALK[:2], begins=False) == (
        f"{CURIOUS} USER: <image>\nWhat is this? ASSISTANT: A cat.<|endoftext|>"
    )
    assert rendered("imp_phi3", TALK[:1], begins=False, asks=True) == (
        f"<|system|>\n{CURIOUS}<|end|>\n<|user|>\n<image>\nWhat is this?<|end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_our_own_runs_are_asked_as_they_were_trained(tmp_path: Path, legacy: bool) -> None:
    """LaVIN's layout tokenizes the head and each turn apart, a server one text as a whole."""
    transformers = pytest.importorskip("transformers")
    shutil.copyfile(DEMO, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"legacy": legacy}))
    layout = Layout(open_tokenizer(tmp_path), image_tokens=1, modality=False)
    image = next_free(tmp_path)
    add_tokens(tmp_path, {"<image>": image})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def served(name: str, messages: list[dict[str, object]], *, asks: bool) -> list[int]:
        text = rendered(name, messages, spaced=True, asks=asks)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    turns = [(instruction("What is this?"), "A cat."), (instruction("Why?"), "Because.")]
    trained = layout.turns("x", turns, "picture.png")
    (slot,) = trained.image_slots
    expected = [*trained.input_ids[:slot], image, *trained.input_ids[slot + 1 :]]
    assert served("instruction", TALK, asks=False) == expected
    words = [{"role": "user", "content": "Why?"}]
    assert served("instruction", words, asks=True) == layout.prompt_only("x", instruction("Why?")).input_ids
    words = [{"role": "user", "content": "How many? (A) one (B) two"}]
    expected = layout.prompt_only("x", scienceqa_prompt("How many? (A) one (B) two")).input_ids
    assert served("scienceqa", words, asks=True) == expected


def test_there_was_no_system_prompt_in_our_own_runs() -> None:
    template = jinja2.Environment().from_string(jinja("instruction", begins=True, spaced=True))

    def refuse(why: str) -> None:
        raise ValueError(why)

    with pytest.raises(ValueError, match="without a system prompt"):
        template.render(messages=[{"role": "system", "content": "x"}], raise_exception=refuse, bos_token="")


def test_each_model_has_the_conversation_that_it_was_trained_with() -> None:
    shape = {"vocab_size": 8, "dim": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "ffn_dim": 8}
    vicuna, llama3 = LlamaConfig(**shape), LlamaConfig(**shape, rope_theta=500_000.0)
    phi = PhiConfig(**shape, norm_eps=1e-5, rotary_dim=4)
    assert template_name(vicuna, "clip", "auto") == "vicuna_v1"
    assert template_name(llama3, "clip", "auto") == "llava_llama_3"
    assert template_name(llama3, "siglip", "auto") == "bunny_llama"
    assert template_name(phi, "siglip", "auto") == "bunny"
    assert template_name(phi, "siglip", "imp") == "imp_phi2"


@pytest.mark.parametrize("name", [*CONVERSATIONS, *LAVIN])
def test_what_people_write_is_never_a_template(name: str) -> None:
    text = rendered(name, [{"role": "user", "content": "{{ 7 * 7 }} {% if %} 'a' \"b\" \\n"}])
    assert "{{ 7 * 7 }} {% if %} 'a' \"b\" \\n" in text
