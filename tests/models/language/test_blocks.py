"""Blocks of every family against a plain fp32 expression, with MMA too; residual dropout; names; refused configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.counting import counting
from kernels.dispatch import set_backend
from kernels.dropout import keep_mask
from models.adapters.mma import AdapterConfig, MMAdapter
from models.language.decoder import Decoder, DecoderConfig, Layer
from models.language.layer import DROP_PATH_SITE, RESIDUAL_SITE
from tests.models.drawn import drawn
from tests.models.language.small import (
    ADAPTER,
    CONFIGS,
    CPU,
    SEED,
    TOKENS,
    context,
    decoder,
    pack,
    plain_stream,
    stream,
    x_of,
)
from tests.models.shapes import language

MMA = [("llama", "attn"), ("phi", "attn"), ("phi3", "block"), ("stablelm", "block")]


@pytest.fixture
def triton() -> Iterator[None]:
    previous = set_backend("triton")
    yield
    set_backend(previous)


def check_against_the_plain_expression(config: DecoderConfig, placement: str | None) -> None:
    """Outputs and every gradient, in training of all weights; beside MMA adapters norms are frozen."""
    model = decoder(config)
    if placement is not None:
        model.add_adapters(ADAPTER, placement, 0)
        drawn(model)
    weights = {n: p for n, p in model.named_parameters() if n.startswith("layers.")}
    trained = {n: p.requires_grad_() for n, p in weights.items() if placement is None or "norm." not in n}
    x, weight = x_of(), x_of(seed=2).detach()
    expected, found = plain_stream(model, x, weights), stream(model, x, context(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *trained.values()]) for y in (expected, found)]
    for n, a, b in zip(["x", *trained], *grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=lambda text, n=n: f"{n}: {text}")  # type: ignore[misc]


@pytest.mark.parametrize(("name", "placement"), [*((name, None) for name in CONFIGS), *MMA])
def test_blocks_are_the_plain_expression(name: str, placement: str | None) -> None:
    check_against_the_plain_expression(CONFIGS[name], placement)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("name", "placement"), [("phi", None), ("phi3", None), ("stablelm", "block")])
def test_so_they_are_by_the_kernels(name: str, placement: str | None) -> None:
    """One layer: each row costs the interpreter time."""
    check_against_the_plain_expression(replace(CONFIGS[name], num_layers=1), placement)


def layer_of_ones(name: str) -> tuple[Decoder, Layer]:
    """The second layer of a decoder; its attention and its MLP give ones."""
    model = decoder(CONFIGS[name])
    layer = model.blocks()[1]
    for label, parameter in layer.named_parameters():
        if label.startswith(("attention.o", "mlp.down")):
            parameter.data.fill_(float(label.endswith("bias")))
    return model, layer


@pytest.mark.parametrize("name", ["phi", "dropped"])
def test_drop_path_falls_on_both_branches(name: str) -> None:
    """What is added is the sum of two masks, of a bit a segment, each scaled by 1 / (1 - p)."""
    model, layer = layer_of_ones(name)
    layer.drop_path, layer.residual_dropout = 0.5, 0.0
    seen = set()
    for number in range(8):
        seed = torch.tensor([number])
        x, delta = layer(x_of(), None, of := context(model, seed))
        masks = [keep_mask(seed, DROP_PATH_SITE + 2 + which, 2, 1, 0.5, CPU) for which in (0, 1)]
        expected = sum(mask[of.segment_of] / 0.5 for mask in masks)
        torch.testing.assert_close(x + delta - x_of(), expected.expand(-1, 32), rtol=0, atol=1e-5)
        seen |= {tuple(map(bool, pair)) for pair in torch.cat(masks, dim=1)}
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["phi", "dropped"])
def test_residual_dropout_falls_on_both_branches(name: str) -> None:
    """What is added is the sum of two masks, each scaled by 1 / (1 - p)."""
    model, layer = layer_of_ones(name)
    x, delta = layer(x_of(), None, context(model, SEED))
    masks = [keep_mask(SEED, RESIDUAL_SITE + 2 + which, TOKENS, 32, 0.4, CPU) for which in (0, 1)]
    torch.testing.assert_close(x + delta - x_of(), sum(mask / 0.6 for mask in masks), rtol=0, atol=1e-5)
    x, delta = layer(x_of(), None, context(model))
    torch.testing.assert_close(x + delta - x_of(), torch.full((TOKENS, 32), 2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "placement"), MMA)
def test_mma_starts_as_the_identity(name: str, placement: str) -> None:
    model = decoder(CONFIGS[name])
    plain = stream(model, x_of(), context(model))
    model.add_adapters(AdapterConfig(), placement, 0)
    adapters = [module for module in model.modules() if isinstance(module, MMAdapter)]
    assert len(adapters) == 2 * (1 if placement == "attn" else 2)
    for adapter in adapters:
        adapter.reset()
    torch.testing.assert_close(stream(model, x_of(), context(model, SEED if name != "phi" else None)), plain)


def test_a_parallel_block_takes_an_adapter_before_attention_alone() -> None:
    with pytest.raises(ValueError, match="one norm"):
        decoder(CONFIGS["phi"]).add_adapters(AdapterConfig(), "block", 0)


def test_the_names_are_those_of_checkpoints() -> None:
    names = {name: {n for n, _ in decoder(CONFIGS[name]).named_parameters() if "layers.1" not in n} for name in CONFIGS}
    around = {"embed.weight", "norm.weight", "head.weight"}
    inner = lambda *parts: {f"layers.0.{part}.weight" for part in parts}  # noqa: E731
    split = inner("attention_norm", "attention.q", "attention.k", "attention.v", "attention.o", "mlp_norm")
    assert names["llama"] == around | split | inner("mlp.gate", "mlp.up", "mlp.down")
    assert names["phi3"] == around | inner(
        "attention_norm", "attention.qkv", "attention.o", "mlp_norm", "mlp.gate_up", "mlp.down"
    )
    phi = around | split - inner("mlp_norm") | inner("mlp.up", "mlp.down")
    assert names["phi"] == {name.replace("weight", kind) for name in phi for kind in ("weight", "bias")} - {
        "embed.bias"
    }
    assert names["stablelm"] == names["llama"] | {
        name.replace("weight", "bias")
        for name in inner("attention_norm", "attention.q", "attention.k", "attention.v", "mlp_norm") | {"norm.weight"}
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"num_heads": 3}, "multiple"), ({"num_kv_heads": 3}, "multiple"), ({"rotary_dim": 10}, "at most a head's 8"),
     ({"rotary_dim": 3}, "even"), ({"window": 0}, "window")],
    ids=str,
)  # fmt: skip
def test_a_config_that_is_no_shape(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        language("llama", **wrong)


def test_both_gradients_of_phis_norm_arrive_in_its_own_backward_pass() -> None:
    """A sum of them before it would be one more pass over the stream."""
    meta = torch.device("meta")
    model = decoder(CONFIGS["phi"])
    pack(model.blocks(), 4)  # the gradients of q, k, v are one sum
    here = context(model)
    here = replace(here, segments=here.segments.to(meta), rope=(here.rope[0].to(meta), here.rope[1].to(meta)))
    block, x, delta = model.blocks()[0].to(meta), x_of().to(meta), x_of().to(meta)
    with counting() as counter:
        y = block(x, delta, here)[1]
        forward = counter.mark()
        torch.autograd.grad(y, [x, delta], torch.empty_like(y))
    names = [op.name for op in counter.since(forward)]
    assert names.count("norm_backward") == 1 and "add" not in names
