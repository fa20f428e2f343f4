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
    "images": [(11, True), (40, True), (25, True), (18, True)],
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
    return torch.tensor([[0] + [j + 1 if j < shortest else j for j in range(width - 1)]])


def greedy(
    model: VisionLanguageModel, samples: list[Sample], tiles: list[Tensor | None], eos_id: int = NEVER, *,
    legacy: bool = False,
) -> list[list[int]]:  # fmt: skip
    """The likeliest token, again and again, each from a whole padded forward pass of all that is written so far."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    reference = PaddedReference(model.config, weights)
    lengths = [len(sample.input_ids) for sample in samples]
    texts = [list(sample.input_ids) for sample in samples]
    for _ in range(NEW_TOKENS):
        labels = [[IGNORE] * len(ids) for ids in texts]
        longer = [
            Sample(s.id, i, n, None, s.image_slots, False) for s, i, n in zip(samples, texts, labels, strict=True)
        ]
        batch = pad(longer, tiles, IMAGE_SIZE)
        positions = legacy_positions(batch.input_ids.shape[1], min(lengths)) if legacy else None
        logits = reference.logits(batch, positions=positions)
        for ids, row in zip(texts, logits, strict=True):
            ids.append(int(row[len(ids)].argmax()))  # the last token's row: the modality token comes first
    answers = [ids[length:] for ids, length in zip(texts, lengths, strict=True)]
    return [answer[: answer.index(eos_id)] if eos_id in answer else answer for answer in answers]


def decode(
    model: VisionLanguageModel, samples: list[Sample], tiles: list[Tensor | None], eos_id: int = NEVER,
    *, seed: int = 1, **sampling: float | bool,
) -> list[list[int]]:  # fmt: skip
    options = Sampling(**{"max_new_tokens": NEW_TOKENS, "temperature": 0.0, **sampling})
    return generate(
        model, samples, tiles, sampling=options, generator=torch.Generator().manual_seed(seed), eos_id=eos_id,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["positions", "legacy_positions"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("config", CONFIGS, ids=["attn", "block", "normal", "block_routing"])
def test_cached_decoding_writes_what_the_padded_formulas_write(config: VLMConfig, batch: str, legacy: bool) -> None:
    model, (samples, tiles) = tiny_model(config), prompts_of(batch)
    expected = greedy(model, samples, tiles, legacy=legacy)
    assert len({tuple(answer) for answer in expected}) == len(expected), "the prompts do not matter"
    assert decode(model, samples, tiles, legacy_positions=legacy) == expected


@pytest.mark.parametrize("vision_placement", ["router", "router_block"])
@pytest.mark.parametrize("batch", ["mixed", "images"])
def test_legacy_routing_lets_the_first_sample_route_all_images(batch: str, vision_placement: str) -> None:
    """In the mixed batch it is a text sample: zeros route."""
    legacy = tiny_config(vision_placement=vision_placement, legacy=Legacy(clip_router=True))
    model, (samples, tiles) = tiny_model(legacy), prompts_of(batch)
    expected = greedy(model, samples, tiles)
    assert decode(model, samples, tiles, legacy_clip_router=True) == expected
    assert decode(tiny_model(tiny_config(vision_placement=vision_placement)), samples, tiles) != expected


def test_legacy_positions_matter() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), prompts_of("mixed")
    assert decode(model, samples, tiles) != decode(model, samples, tiles, legacy_positions=True)


def test_each_answer_ends_at_its_own_end_of_sequence() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), prompts_of("mixed")
    free = greedy(model, samples, tiles)
    eos_id = free[1][NEW_TOKENS // 2]
    expected = greedy(model, samples, tiles, eos_id)
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
