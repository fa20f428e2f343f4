"""How a step is cut into packs, and what fills them up, changes neither loss nor gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.data.packing import collate, filled_tokens, token_weights
from engine.data.padding import pad
from models.pack import Pack, Segments
from models.vlm import VLMConfig
from tests.models.tiny import (
    IMAGE_SIZE,
    LAYOUT,
    LEGACY,
    PLACEMENTS,
    TEXT_ONLY,
    VOCAB,
    assert_close,
    assert_gradients_close,
    gradients,
    label,
    packs_of,
    random_samples,
    step_loss,
    tiny_config,
    tiny_model,
)


@pytest.mark.parametrize("config", PLACEMENTS + LEGACY, ids=label)
def test_how_samples_are_packed_changes_nothing(config: VLMConfig) -> None:
    model = tiny_model(config).double()
    one_pack = [list(range(len(LAYOUT)))]
    one_each = [[i] for i in range(len(LAYOUT))]
    shuffled = [[7, 1, 4], [9, 0, 3, 2], [8, 6, 5]]
    losses = [step_loss(model, plan=plan) for plan in (one_pack, one_each, shuffled)]
    found = [gradients(loss, dict(model.named_parameters())) for loss in losses]
    for loss, gradient in zip(losses[1:], found[1:], strict=True):
        assert_close(loss, losses[0], "loss", tolerance=1e-10)
        assert_gradients_close(gradient, found[0], tolerance=1e-8)


def test_what_stands_in_the_padding_has_no_influence() -> None:
    """Rows that fill up to 128 are read by nobody: neither their ids nor their number matters."""
    model, (samples, tiles) = tiny_model(tiny_config(language_placement="block")), random_samples(LAYOUT)
    weights = dict(model.named_parameters())
    pack = collate(samples, token_weights(samples, "token"), tiles)
    filled = filled_tokens(pack) + 2
    assert filled < pack.input_ids.numel()
    loss = model(pack)
    expected = gradients(loss, weights)

    other_ids = pack.input_ids.clone()
    other_ids[filled:] = torch.arange(1, 1 + len(other_ids) - filled) % VOCAB
    other_loss = model(replace(pack, input_ids=other_ids))
    assert torch.equal(other_loss, loss)
    other = gradients(other_loss, weights)
    assert all(torch.equal(other[name], gradient) for name, gradient in expected.items())

    longer = lengthen(pack, 128)
    longer_loss = model(longer)
    assert_close(longer_loss, loss, "loss with more padding")
    assert_gradients_close(gradients(longer_loss, weights), expected, floor=2e-7)


def lengthen(pack: Pack, rows: int) -> Pack:
    """The same pack whose last segment, the padding, is `rows` longer; supervised rows of weight 0 are added too."""
    segments = pack.segments
    bounds, positions = segments.cu_seqlens.clone(), segments.position_ids
    bounds[-1] += rows
    more_positions = torch.arange(int(positions[-1]) + 1, int(positions[-1]) + 1 + rows, dtype=positions.dtype)
    more = Segments(
        cu_seqlens=bounds,
        max_seqlen=max(segments.max_seqlen, int(bounds[-1] - bounds[-2])),
        position_ids=torch.cat([positions, more_positions]),
        router_row=torch.cat([segments.router_row, segments.router_row.new_ones(rows)]),
    )
    return replace(
        pack,
        input_ids=torch.cat([pack.input_ids, torch.arange(rows) % VOCAB]),
        segments=more,
        supervised=torch.cat([pack.supervised, torch.arange(rows)]),
        labels=torch.cat([pack.labels, torch.arange(rows) % VOCAB]),
        weights=torch.cat([pack.weights, torch.zeros(rows)]),
    )


def test_a_dummy_tile_gives_every_parameter_a_gradient_and_changes_nothing() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), random_samples(TEXT_ONLY)
    weights = token_weights(samples, "token")
    plain, dummy = (model(collate(samples, weights, tiles, dummy_size=size)) for size in (0, IMAGE_SIZE))
    assert torch.equal(plain, dummy)
    expected = gradients(plain, dict(model.named_parameters()))
    dummy.backward()
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None and torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("config", [PLACEMENTS[1], PLACEMENTS[-1], LEGACY[1]], ids=label)
def test_filling_packs_up_to_few_shapes_changes_nothing(config: VLMConfig) -> None:
    """Empty segments, rows of weight 0 and tiles of zeros, whose slots are the text modality's row."""
    model, (samples, tiles) = tiny_model(config).double(), random_samples(LAYOUT)
    clip_router = config.legacy.clip_router
    seed = torch.tensor([3])
    packs = [pack for _, pack in packs_of(samples, tiles, micro_batch=3, legacy_clip_router=clip_router)]
    filled = [pad(pack) for pack in packs]
    assert any(len(a.image_slots) < len(b.image_slots) for a, b in zip(packs, filled, strict=True))
    plain, padded = (torch.stack([model(pack, seed) for pack in some]).sum() for some in (packs, filled))
    assert_close(padded, plain, "loss", tolerance=1e-12)
    weights = dict(model.named_parameters())
    assert_gradients_close(gradients(padded, weights), gradients(plain, weights), tolerance=1e-10)
