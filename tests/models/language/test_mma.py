"""MMA in joint models of the other families: how samples are packed changes nothing, and decoding from a cache writes
what whole forward passes write. LaVIN's own are in tests/models/test_packs.py and test_generation.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.data.packing import collate
from engine.data.sample import IGNORE, Sample
from engine.generation import Sampling, generate
from models.vlm import VLMConfig
from tests.models.shapes import language
from tests.models.tiny import (
    assert_close,
    assert_gradients_close,
    gradients,
    random_samples,
    step_loss,
    tiny_config,
    tiny_model,
)

GROUPED = {"num_kv_heads": 2}
CONFIGS: dict[str, VLMConfig] = {
    "phi": replace(tiny_config(), language=language("phi", **GROUPED)),
    "phi3": replace(tiny_config(language_placement="block"), language=language("phi3", window=5, **GROUPED)),
    "stablelm": replace(tiny_config(language_placement="block"), language=language("stablelm", **GROUPED)),
}
LAYOUT = [(9, False), (31, True), (17, False), (12, True)]
NEW_TOKENS = 8


@pytest.mark.parametrize("name", CONFIGS)
def test_how_samples_are_packed_changes_nothing(name: str) -> None:
    model = tiny_model(CONFIGS[name]).double()
    losses = [
        step_loss(model, layout=LAYOUT, plan=plan) for plan in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 0], [2, 1]])
    ]
    found = [gradients(loss, dict(model.named_parameters())) for loss in losses]
    assert all(value.any() for label, value in found[0].items() if "_adapter." in label)
    for loss, gradient in zip(losses[1:], found[1:], strict=True):
        assert_close(loss, losses[0], "loss", tolerance=1e-10)
        assert_gradients_close(gradient, found[0], tolerance=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_writes_what_whole_forward_passes_write(name: str) -> None:
    """Prompts of several lengths together, against each alone and from its beginning for every token."""
    model, (samples, tiles) = tiny_model(CONFIGS[name]), random_samples(LAYOUT, seed=3)
    written = generate(
        model, samples, tiles, sampling=Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0),
        generator=torch.Generator(), eos_id=-1, device=torch.device("cpu"),
    )  # fmt: skip
    for sample, tile, answer in zip(samples, tiles, written, strict=True):
        ids = list(sample.input_ids)
        for token in answer:
            longer = Sample(sample.id, ids, [IGNORE] * len(ids), None, sample.image_slots, False)
            hidden = model.hidden(collate([longer], [torch.zeros(len(ids))], [tile]))
            last = 2 + len(ids) - 1  # behind the two modality rows
            assert int(model.logits(hidden)[last].argmax()) == token
            ids.append(token)
    assert len(set(map(tuple, written))) == len(written) and all(len(answer) == NEW_TOKENS for answer in written)
