"""Decoding with the KV cache against running the padded formulas over everything again for every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.data.sample import IGNORE, Sample
from engine.generation import Sampling, generate
from models.vlm import Legacy, VisionLanguageModel, VLMConfig
from tests.models.padded_reference import PaddedReference, pad
from tests.models.tiny import IMAGE_SIZE, random_samples, tiny_config, tiny_model

NEW_TOKENS = 12
NEVER = -1  # no token has this id
BATCHES = {
    "mixed": [(14, False), (31, True), (11, True), (12, False), (26, True)],
    "text": [(9, False), (2, False), (30, False)],
    "images": [(11, True), (40, True)],
    "one": [(13, True)],
}
CONFIGS = [
    tiny_config(),
    tiny_config(language_placement="block", vision_placement="router_block", ffn_dim=37),
    tiny_config(vision_placement="normal"),
    tiny_config(language_placement="block", legacy=Legacy(block_routing=True)),
]


def prompts_of(batch: str) -> tuple[list[Sample], list[Tensor | None]]:
    samples, tiles = random_samples(BATCHES[batch], seed=3)
    for sample in samples:
        sample.labels = [IGNORE] * len(sample.labels)
    return samples, tiles


def legacy_positions(width: int, shortest: int) -> Tensor:
    """LaVIN prefills [modality] + tokens[0 : shortest] at positions 0, 1, 2, ...; after that token j of a text, given
    or written, goes through the model alone and at position j."""
    positions = [0]
    for j in range(width - 1):
        in_prefill = j < shortest
        positions.append(j + 1 if in_prefill else j)
    return torch.tensor(positions)


def greedy(
    model: VisionLanguageModel, samples: list[Sample], tiles: list[Tensor | None], eos_id: int, *, legacy: bool
) -> list[list[int]]:
    """The likeliest token, again and again, from one whole padded forward pass for each token of each prompt."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    reference = PaddedReference(model.config, weights)
    shortest = min(len(sample.input_ids) for sample in samples)
    answers = []
    for sample, tile in zip(samples, tiles, strict=True):
        ids = list(sample.input_ids)
        while len(ids) < len(sample.input_ids) + NEW_TOKENS:
            longer = Sample(sample.id, ids, [IGNORE] * len(ids), None, sample.image_slots, truncated=False)
            batch = pad([longer], [tile], IMAGE_SIZE)
            positions = legacy_positions(1 + len(ids), shortest)[None] if legacy else None
            token = int(reference.logits(batch, positions=positions)[0, -1].argmax())
            if token == eos_id:
                break
            ids.append(token)
        answers.append(ids[len(sample.input_ids) :])
    return answers


def decode(
    model: VisionLanguageModel, samples: list[Sample], tiles: list[Tensor | None], eos_id: int = NEVER,
    **sampling: float,
) -> list[list[int]]:  # fmt: skip
    options = Sampling(**{"max_new_tokens": NEW_TOKENS, "temperature": 0.0, **sampling})
    return generate(model, samples, tiles, sampling=options, eos_id=eos_id, device=torch.device("cpu"))


@pytest.mark.parametrize("legacy", [False, True], ids=["positions", "legacy_positions"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("config", CONFIGS, ids=["attn", "block", "normal", "block_routing"])
def test_cached_decoding_writes_what_the_padded_formulas_write(config: VLMConfig, batch: str, legacy: bool) -> None:
    model, (samples, tiles) = tiny_model(config), prompts_of(batch)
    expected = greedy(model, samples, tiles, NEVER, legacy=legacy)
    assert len({tuple(answer) for answer in expected}) == len(expected), "the prompts do not matter"
    assert decode(model, samples, tiles, legacy_positions=legacy) == expected


def test_legacy_positions_matter() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), prompts_of("mixed")
    assert decode(model, samples, tiles) != decode(model, samples, tiles, legacy_positions=True)


def test_each_answer_ends_at_its_own_end_of_sequence() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), prompts_of("mixed")
    free = greedy(model, samples, tiles, NEVER, legacy=False)
    eos_id = free[1][NEW_TOKENS // 2]
    expected = greedy(model, samples, tiles, eos_id, legacy=False)
    assert len({len(answer) for answer in expected}) > 1
    assert decode(model, samples, tiles, eos_id) == expected


def test_an_answer_does_not_depend_on_its_batch() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), prompts_of("mixed")
    alone = [decode(model, [sample], [tile])[0] for sample, tile in zip(samples, tiles, strict=True)]
    assert decode(model, samples, tiles) == alone


def test_sampling_repeats_with_its_seed_and_a_tiny_nucleus_is_greedy() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), prompts_of("mixed")
    hot = {"temperature": 2.0, "top_p": 0.9}
    first = decode(model, samples, tiles, **hot, seed=1)
    assert decode(model, samples, tiles, **hot, seed=1) == first
    assert decode(model, samples, tiles, **hot, seed=2) != first
    assert decode(model, samples, tiles, temperature=2.0, top_p=1e-6) == decode(model, samples, tiles)
