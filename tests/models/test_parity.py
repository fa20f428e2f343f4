"""The joint model against LaVIN's formulas written with padding (padded_reference.py), values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch

from engine.data.packing import Reduction, collate, token_weights
from models.vlm import Legacy, VisionLanguageModel, VLMConfig
from tests.models.padded_reference import PaddedReference, pad
from tests.models.tiny import (
    IMAGE_SIZE,
    LAYOUT,
    LEGACY,
    MICRO_BATCH,
    PLACEMENTS,
    TEXT_ONLY,
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

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
TRAINED = [
    tiny_config(train_language="full", train_vision="full"),
    tiny_config(train_language="full", train_vision="frozen", train_projector="frozen"),
    tiny_config(train_language="frozen", train_vision="frozen"),
    tiny_config(train_language="frozen", train_vision="mma", vision_placement="router_block"),
    tiny_config(train_language="mma", train_vision="full", language_placement="block"),
]


@pytest.fixture(params=["fp64", "fp32", "cuda"])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[torch.device, torch.dtype, float]]:
    """Where and in which dtype the model runs, and the absolute error that is granted on top of the relative one:
    the router's gradients are small differences of sums over all tokens, and weights of targets are always fp32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if request.param == "fp64":
        yield torch.device("cpu"), torch.float64, 1e-9
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda" if request.param == "cuda" else "cpu"), torch.float32, 2e-7
    torch.backends.cudnn.allow_tf32 = allowed


def reference_of(model: VisionLanguageModel) -> PaddedReference:
    """The padded model on fp64 copies of the same weights."""
    weights = {
        name: parameter.detach().double().cpu().requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    return PaddedReference(model.config, weights, MICRO_BATCH)


@pytest.mark.parametrize("config", PLACEMENTS + LEGACY + TRAINED, ids=label)
def test_losses_and_gradients_are_those_of_the_padded_formulas(
    config: VLMConfig, place: tuple[torch.device, torch.dtype, float]
) -> None:
    device, dtype, floor = place
    model, (samples, tiles) = tiny_model(config).to(device, dtype), random_samples(LAYOUT)
    reference, batch = reference_of(model), pad(samples, tiles, IMAGE_SIZE)
    logits = reference.logits(batch)
    for reduction in REDUCTIONS:
        loss = step_loss(model, reduction)
        expected = reference.loss(logits, batch, reduction, MICRO_BATCH)
        assert_close(loss, expected, f"{reduction} loss")
        wanted = gradients(expected, reference.weights)
        assert all(gradient.any() for gradient in wanted.values()), "a path is switched off"
        assert_gradients_close(gradients(loss, dict(model.named_parameters())), wanted, floor=floor)


@pytest.mark.parametrize("config", PLACEMENTS + LEGACY, ids=label)
def test_logits_at_supervised_rows_are_those_of_the_padded_formulas(
    config: VLMConfig, place: tuple[torch.device, torch.dtype, float]
) -> None:
    device, dtype, _ = place
    model, (samples, tiles) = tiny_model(config).to(device, dtype), random_samples(LAYOUT)
    batch = pad(samples, tiles, IMAGE_SIZE)
    expected = reference_of(model).logits(batch).detach()
    packs = packs_of(samples, tiles, micro_batch=MICRO_BATCH, legacy_clip_router=config.legacy.clip_router)
    assert len(packs) > 1
    for members, pack in packs:
        targets = batch.labels[members, 1:]  # [B, S - 1]
        rows = expected[members, :-1][targets >= 0]
        assert torch.equal(pack.labels[: len(rows)], targets[targets >= 0])
        with torch.no_grad():
            got = model.logits(model.hidden(pack.to(device))[pack.supervised[: len(rows)].to(device)])
        assert_close(got, rows, "logits")


def test_legacy_block_routing_is_for_evaluation() -> None:
    """LaVIN trained with the routing of the formulas."""
    plain, legacy = (
        tiny_model(tiny_config(language_placement="block", legacy=Legacy(block_routing=switch)))
        for switch in (False, True)
    )
    assert not torch.equal(step_loss(legacy), step_loss(plain))
    assert torch.equal(step_loss(legacy.train()), step_loss(plain.train()))


def test_positions_go_on_past_the_first_rope_table() -> None:
    layout = [(30, True), (2048, False), (2300, False)]
    model, (samples, tiles) = tiny_model(tiny_config(num_layers=1)).double(), random_samples(layout)
    for sample, tile in zip(samples, tiles, strict=True):
        batch = pad([sample], [tile], IMAGE_SIZE)
        with torch.no_grad():
            expected = reference_of(model).logits(batch)[0, 1:]
            got = model.logits(model.hidden(collate([sample], token_weights([sample], "token"), [tile])))
        assert_close(got[2 : 2 + len(expected)], expected, "logits")


def test_text_only_packs_leave_the_tower_alone() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()).double(), random_samples(TEXT_ONLY)
    reference = reference_of(model)
    batch = pad(samples, tiles, IMAGE_SIZE)
    expected = reference.loss(reference.logits(batch), batch, "token", MICRO_BATCH)
    loss = step_loss(model, "token", TEXT_ONLY)
    assert_close(loss, expected, "loss")
    assert_gradients_close(gradients(loss, dict(model.named_parameters())), gradients(expected, reference.weights))
    loss.backward()
    assert all((p.grad is None) == name.startswith(("vision", "projector")) for name, p in model.trainable().items())
