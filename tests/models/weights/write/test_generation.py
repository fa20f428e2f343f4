"""generation_config.json: what transformers would refuse is put right, the rest is kept."""

from __future__ import annotations

from models.weights.write.generation import generation_settings

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "vocab_size": 9}


def test_vicunas_sampling_without_sampling() -> None:
    vicuna = {"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0, "transformers_version": "4.31.0"}
    assert generation_settings(vicuna, TOKENS) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6, "do_sample": True,
    }  # fmt: skip


def test_nothing_is_changed_that_is_right() -> None:
    said = {"bos_token_id": 5, "eos_token_id": [6, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert generation_settings(said, TOKENS) == said
    assert "do_sample" not in generation_settings({"max_length": 7}, TOKENS)


def test_without_a_file_the_tokens_of_the_model_count() -> None:
    assert generation_settings(None, TOKENS) == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}


def test_llama_3_ends_its_turns_too() -> None:
    llama3 = {"eos_token_id": 128001}
    assert generation_settings(llama3, TOKENS, answers_end_with=128009)["eos_token_id"] == [128001, 128009]
    both = {"eos_token_id": [128001, 128009]}
    assert generation_settings(both, TOKENS, answers_end_with=128009)["eos_token_id"] == [128001, 128009]
