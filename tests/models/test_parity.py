"""The joint model against LaVIN's formulas written with padding (padded_reference.py), values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from engine.data.packing import Reduction, collate, filled_tokens, token_weights
from models.pack import Pack, Segments
from models.vlm import Legacy, VisionLanguageModel, VLMConfig
from tests.models.padded_reference import PaddedReference, pad
from tests.models.tiny import (
    IMAGE_SIZE,
    VOCAB,
    assert_close,
    assert_gradients_close,
    gradients,
    packs_of,
    random_samples,
    tiny_config,
    tiny_model,
)  # fmt: skip

MICRO_BATCH = 3
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
# Micro-batch 0 starts with a text sample, 1 with an image, 2 has no image at all, 3 is a single sample.
LAYOUT = [
    (9, False), (31, True), (17, False), (44, True), (12, True), (60, False), (23, False), (70, False), (8, False),
    (13, True),
]  # fmt: skip
TEXT_ONLY = [(9, False), (40, False), (3, False), (2, False)]

PLACEMENTS = [
    tiny_config(language_placement=language, vision_placement=vision, ffn_dim=ffn_dim)
    for language in ("attn", "block")
    for vision, ffn_dim in (("router", 48), ("router_block", 37), ("normal", 48))
]
LEGACY = [
    tiny_config(legacy=Legacy(clip_router=True)),
    tiny_config(vision_placement="router_block", legacy=Legacy(clip_router=True)),
    tiny_config(vision_placement="normal", legacy=Legacy(normal_adapter=True)),
    tiny_config(language_placement="block", legacy=Legacy(block_routing=True)),
    tiny_config(
        language_placement="block",
        vision_placement="router_block",
        legacy=Legacy(clip_router=True, block_routing=True, normal_adapter=True),
    ),
]
TRAINED = [
    tiny_config(train_language="full", train_vision="full"),
    tiny_config(train_language="full", train_vision="frozen", train_projector="frozen"),
    tiny_config(train_language="frozen", train_vision="frozen"),
    tiny_config(train_language="frozen", train_vision="mma", vision_placement="router_block"),
    tiny_config(train_language="mma", train_vision="full", language_placement="block"),
]


def label(config: VLMConfig) -> str:
    switches = [name for name in Legacy.__slots__ if getattr(config.legacy, name)]
    trained = [config.train_language, config.train_vision]
    return "-".join([config.language_placement, config.vision_placement, *switches, *trained])


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


def step_loss(
    model: VisionLanguageModel, reduction: Reduction = "micro_batch", layout: list[tuple[int, bool]] = LAYOUT,
    plan: list[list[int]] | None = None, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of a whole step, summed over its packs."""
    samples, tiles = random_samples(layout)
    packs = packs_of(
        samples, tiles, reduction=reduction, micro_batch=MICRO_BATCH, plan=plan,
        legacy_clip_router=model.config.legacy.clip_router,
    )  # fmt: skip
    device = model.modality_embedding.weight.device
    return torch.stack([model(pack.to(device), seed) for _, pack in packs]).sum()


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


def test_a_dummy_tile_gives_every_parameter_a_gradient_and_changes_nothing() -> None:
    model, (samples, tiles) = tiny_model(tiny_config()), random_samples(TEXT_ONLY)
    weights = token_weights(samples, "token")
    plain, dummy = (model(collate(samples, weights, tiles, dummy_size=size)) for size in (0, IMAGE_SIZE))
    assert torch.equal(plain, dummy)
    expected = gradients(plain, dict(model.named_parameters()))
    dummy.backward()
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None and torch.equal(parameter.grad, expected[name]), name


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
