"""Adapter dropout and drop path: what they do, that a seed repeats them, and that recomputation draws the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.data.packing import collate, token_weights
from models.adapters.mma import MMAdapter, PlainAdapter
from models.pack import Pack
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel
from tests.models.padded_reference import PaddedReference, pad
from tests.models.tiny import IMAGE_SIZE, assert_close, gradients, random_samples, tiny_config, tiny_model

LAYOUT = [(9, False), (31, True), (17, False), (44, True), (12, True), (60, False)]


def one_pack() -> Pack:
    samples, tiles = random_samples(LAYOUT)
    return collate(samples, token_weights(samples, "token"), tiles)


def seed_of(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int64)


def loss_and_gradients(model: VisionLanguageModel, pack: Pack, seed: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(pack, seed)
    return loss, gradients(loss, dict(model.named_parameters()))


@pytest.mark.parametrize("language_placement", ["attn", "block"])
@pytest.mark.parametrize("vision_placement", ["router", "router_block", "normal"])
def test_recomputing_draws_the_same_dropout(language_placement: str, vision_placement: str) -> None:
    options = {
        "language_placement": language_placement, "vision_placement": vision_placement, "dropout": 0.5,
        "drop_path": 0.3,
    }  # fmt: skip
    kept = tiny_model(tiny_config(**options))
    recomputed = tiny_model(tiny_config(**options))
    recomputed.use_activation_policy(ActivationPolicy.uniform("keep_input", 3, 6))
    expected_loss, expected = loss_and_gradients(kept, one_pack(), seed_of(5))
    for model in (kept, recomputed):
        loss, found = loss_and_gradients(model, one_pack(), seed_of(5))
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"dropout": 0.0, "drop_path": 0.5}], ids=["dropout", "drop_path"]
)
def test_another_seed_drops_something_else_and_no_seed_drops_nothing(options: dict[str, float]) -> None:
    with torch.no_grad():
        model, pack = tiny_model(tiny_config(**options)), one_pack()
        losses = [model(pack, seed).item() for seed in (seed_of(1), seed_of(2), None)]
        without = tiny_model(tiny_config(dropout=0.0))(pack, seed_of(1)).item()
    assert len(set(losses)) == 3 and losses[2] == without


def test_every_adapter_has_its_own_dropout_stream() -> None:
    model = tiny_model(tiny_config(language_placement="block", vision_placement="router_block"))
    sites = [module.site for module in model.modules() if isinstance(module, MMAdapter | PlainAdapter)]
    assert len(sites) == 2 * 3 + 2 * 6 and len(set(sites)) == len(sites)
    adapters = [layer.mlp_adapter for layer in model.language.blocks()]
    for adapter in adapters:
        adapter.load_state_dict(adapters[0].state_dict())
    norm, x = model.language.norm, torch.ones(40, 32)
    with torch.no_grad():
        routed = torch.ones(1, 2), torch.zeros(40).int()
        outputs = [adapter(norm, x, None, *routed, seed_of(1))[1] for adapter in adapters]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_dropout_keeps_the_mean() -> None:
    """An adapter is linear in its code, so the mean over many seeds is what no dropout gives."""
    model = tiny_model(tiny_config(num_layers=1, dropout=0.4))
    layer = model.language.blocks()[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    adapter, row = layer.attention_adapter, torch.zeros(5, dtype=torch.int32)
    with torch.no_grad():
        mix = adapter.mix(layer.attention_norm, x[:1])
        _, exact = adapter(layer.attention_norm, x, None, mix, row, None)
        draws = torch.stack([adapter(layer.attention_norm, x, None, mix, row, seed_of(i))[1] for i in range(2000)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 2000**0.5)
    assert draws.std(0).min() > 0 and error.max() < 5


def test_a_dropped_branch_leaves_the_residual_alone() -> None:
    model, pack = tiny_model(tiny_config(drop_path=1 - 1e-9, dropout=0.0)), one_pack()
    with torch.no_grad():
        assert torch.equal(model.hidden(pack, seed_of(3)), model.embed(pack, seed_of(3)))


def test_drop_path_drops_the_branches_of_whole_samples() -> None:
    """Each sample is one of the four ways to keep or drop (and double) the two branches of the only layer."""
    model = tiny_model(tiny_config(num_layers=1, drop_path=0.5, dropout=0.0))
    samples, tiles = random_samples(LAYOUT)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    reference, batch = PaddedReference(model.config, weights), pad(samples, tiles, IMAGE_SIZE)
    ways = [torch.tensor([[[float(a)], [float(b)]]]).expand(1, 2, len(samples)) for a in (0, 2) for b in (0, 2)]
    candidates = [reference.hidden(batch, branch_scale=way) for way in ways]  # [B, S, D] each
    seen = set()
    for number in range(8):
        with torch.no_grad():
            hidden = model.hidden(one_pack(), seed_of(number))
        start = 2  # the two modality rows
        for b, sample in enumerate(samples):
            length = len(sample.input_ids)
            got = hidden[start : start + length].double()
            start += length
            wanted = [candidate[b, 1 : 1 + length] for candidate in candidates]
            nearest = min(range(4), key=lambda way: (wanted[way] - got).abs().max().item())
            assert_close(got, wanted[nearest], f"sample {b}, seed {number}")
            seen.add((b, nearest))
    assert {way for _, way in seen} == {0, 1, 2, 3}
    assert all(len({way for sample, way in seen if sample == b}) > 1 for b in range(len(samples)))
