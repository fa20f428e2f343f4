from __future__ import annotations

import pytest

from engine.data.layout import Layout
from engine.data.sample import IGNORE, Sample
from engine.data.tokenizer import Tokenizer
from engine.errors import DataError, UsageError

PROMPT, ANSWER = "Question: Which?\nResponse:", "The answer is A."


def targets(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != IGNORE]


def test_llama_layout(llama_tokenizer: Tokenizer) -> None:
    layout = Layout(llama_tokenizer)
    text = llama_tokenizer.encode(PROMPT + ANSWER)
    assert text[0] == 894  # the piece with its word start
    answer = [1576, 1234, 338, 319, 29889, 2]
    with_image = layout.pair("x", PROMPT, ANSWER, "/a.png")
    assert with_image.input_ids == [1, 7084, 29901, 29871, *[0] * 6, *text, 2]
    assert with_image.image_slots == [4, 5, 6, 7, 8, 9]  # 5 to 10 behind the modality token
    assert with_image.image == "/a.png"
    text_only = layout.pair("x", PROMPT, ANSWER)
    assert text_only.input_ids == [1, 7084, 29901, 405, 29914, 29909, *text, 2]
    assert text_only.image_slots == [] and text_only.image is None
    for sample in (with_image, text_only):
        assert sample.labels == [IGNORE] * (len(sample.input_ids) - 6) + answer
        assert not sample.truncated


@pytest.mark.parametrize(("image", "capacity"), [("/a.png", 512 - 11), (None, 512 - 7)])
def test_room_for_text_is_lavins(llama_tokenizer: Tokenizer, image: str | None, capacity: int) -> None:
    layout = Layout(llama_tokenizer)
    fixed = len(llama_tokenizer.encode(PROMPT + "a")) + 1  # with EOS
    fits = layout.pair("x", PROMPT, "a" + " cup" * (capacity - fixed), image)
    assert len(fits.input_ids) == 511 and fits.input_ids[-1] == 2 and not fits.truncated
    cut = layout.pair("x", PROMPT, "a" + " cup" * (capacity - fixed + 1), image)
    assert len(cut.input_ids) == 511 and cut.truncated
    assert 2 not in cut.labels  # the EOS is lost
    assert cut.input_ids[:-1] == fits.input_ids[:-1]


def test_answer_begins_where_the_prompt_alone_ends(layout: Layout, tokenizer: Tokenizer) -> None:
    sample = layout.pair("x", PROMPT, ANSWER)
    assert tokenizer.decode(targets(sample)) == ANSWER
    assert targets(sample)[-1] == tokenizer.eos_id
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (token, IGNORE)


def test_number_of_image_slots_is_a_parameter(tokenizer: Tokenizer) -> None:
    sample = Layout(tokenizer, image_tokens=3).pair("x", PROMPT, ANSWER, "/a.png")
    start = len(tokenizer.encode("Image: ")) + 1
    assert sample.image_slots == [start, start + 1, start + 2]
    assert [sample.input_ids[j] for j in sample.image_slots] == [0, 0, 0]
    assert sample.input_ids[start + 3 :] == [*tokenizer.encode(PROMPT + ANSWER), tokenizer.eos_id]


def test_every_turn_is_supervised_up_to_its_own_end(layout: Layout, tokenizer: Tokenizer) -> None:
    turns = [("Instruction: a\nResponse:", "one."), ("Instruction: b\nResponse:", "two."), ("Instruction:", "x")]
    sample = layout.turns("x", turns)
    assert tokenizer.decode(targets(sample)) == "one.two.x"
    single = [layout.pair("x", *turn) for turn in turns]
    head = len(tokenizer.encode("Image: N/A", bos=True))
    assert sample.input_ids[head:] == [token for one in single for token in one.input_ids[head:]]
    assert sample.labels.count(tokenizer.eos_id) == 3 and sample.labels[-1] == tokenizer.eos_id


def test_unknown_tokens_are_never_targets() -> None:
    class WithUnknown:
        bos_id, eos_id, unk_id = 1, 2, 0

        def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
            return [1] * bos + [0 if c == "?" else ord(c) for c in text] + [2] * eos

    sample = Layout(WithUnknown()).pair("x", "p?", "a?b")  # type: ignore[arg-type]
    assert targets(sample) == [ord("a"), ord("b"), 2]


def test_prompt_only(layout: Layout, tokenizer: Tokenizer) -> None:
    asked, trained = layout.prompt_only("x", PROMPT, "/a.png"), layout.pair("x", PROMPT, ANSWER, "/a.png")
    assert trained.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert asked.image_slots == trained.image_slots and asked.image == "/a.png"
    assert targets(asked) == [] and tokenizer.eos_id not in asked.input_ids


def test_a_prompt_too_long_is_an_error_that_says_what_fits(tokenizer: Tokenizer) -> None:
    length = len(Layout(tokenizer).prompt_only("x", PROMPT).input_ids)
    assert len(Layout(tokenizer, length + 1).prompt_only("x", PROMPT).input_ids) == length
    with pytest.raises(DataError, match=f"has {length} tokens, {length - 1} fit") as caught:
        Layout(tokenizer, length).prompt_only("problem 7", PROMPT)
    assert caught.value.where == "problem 7" and str(length + 1) in caught.value.do


def test_no_room_for_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="max_seq_len 9 leaves no room") as caught:
        Layout(tokenizer, 9)
    assert caught.value.do.startswith("--dataset.max_seq_len 512 (LaVIN's), or at least ")
    needed = int(caught.value.do.split()[-1])
    sample = Layout(tokenizer, needed).pair("x", PROMPT, ANSWER, "/a.png")
    assert len(sample.input_ids) == sample.image_slots[-1] + 2 == needed - 1


@pytest.mark.parametrize(("image_tokens", "proposed"), [(576, 2048), (729, 2048), (2928, 4096), (3699, 4096)])
def test_a_length_for_images_of_many_tokens_is_proposed(tokenizer: Tokenizer, image_tokens: int, proposed: int) -> None:
    """LLaVA's and Bunny's images, and anyres' with LaVIN's default of 512: what is proposed works."""
    with pytest.raises(UsageError, match="max_seq_len 512") as caught:
        Layout(tokenizer, image_tokens=image_tokens, modality=False)
    assert caught.value.do.startswith(f"--dataset.max_seq_len {proposed} ") and str(image_tokens) in caught.value.why
    assert len(Layout(tokenizer, proposed, image_tokens).pair("x", PROMPT, ANSWER, "/a.png").input_ids) > image_tokens
    with pytest.raises(UsageError) as caught:
        Layout(tokenizer, image_tokens=4000)
    assert caught.value.do.startswith("--dataset.max_seq_len at least 40")
