"""Which prompts are written together, and where an answer ends. What is written: tests/models/test_generation.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.generation import Sampling, generate, plan_batches
from tests.models.tiny import random_samples, tiny_config, tiny_model

NEVER = -1  # no token has this id


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 8), st.integers(128, 2048), st.integers(1, 64))
def test_a_batch_has_room_for_its_cache(lengths: list[int], most: int, tokens: int, new: int) -> None:
    batches = plan_batches(lengths, Sampling(max_new_tokens=new), max_batch_size=most, tokens_per_batch=tokens)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)  # memory is short at once, or never
    places = [len(batch) * (lengths[batch[0]] + new) for batch in batches]
    assert all(len(batch) <= most for batch in batches)
    assert all(place <= tokens or len(batch) == 1 for place, batch in zip(places, batches, strict=True))
    for batch, place in list(zip(batches, places, strict=True))[:-1]:
        assert len(batch) == most or place + lengths[batch[0]] + new > tokens, "there was room for one more"


@pytest.mark.parametrize("switch", ["legacy_positions", "legacy_clip_router"])
def test_lavins_defects_get_lavins_batches(switch: str) -> None:
    batches = plan_batches(
        [9, 300, 2, 500, 7], Sampling(**{switch: True}), max_batch_size=2, tokens_per_batch=128
    )  # fmt: skip
    assert batches == [[0, 1], [2, 3], [4]]


def test_any_of_several_ends_ends_an_answer() -> None:
    """As LLaMA-3-Instruct's two do; what others write is not changed."""
    model = tiny_model(tiny_config())
    samples, tiles = random_samples([(14, False), (31, True), (11, True)], seed=3)

    def write(eos_id: int, stop_ids: tuple[int, ...] = ()) -> list[list[int]]:
        return generate(
            model, samples, tiles, sampling=Sampling(max_new_tokens=8, temperature=0.0), eos_id=eos_id,
            generator=torch.Generator(), device=torch.device("cpu"), stop_ids=stop_ids,
        )  # fmt: skip

    endless = write(NEVER)
    ends = endless[0][2], endless[1][4]
    first = [min((ids.index(end) for end in ends if end in ids), default=len(ids)) for ids in endless]
    expected = [ids[:length] for ids, length in zip(endless, first, strict=True)]
    assert len(set(first)) > 1 and first[0] <= 2 and first[1] <= 4
    assert write(ends[0], ends[1:]) == write(ends[1], ends[:1]) == expected != write(ends[0])
