"""LoRA on the linears of a decoder against plain torch: what it computes, where it goes, how its dropout repeats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from kernels import lora_linear
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.dispatch import set_backend
from kernels.dropout import keep_mask
from kernels.int8 import Int8Tensor, dequantize_int8
from models.adapters.lora import LoRA, LoRAConfig
from models.adapters.mma import AdapterConfig, MMAdapter
from models.adapters.names import is_adapter
from models.language.decoder import Decoder
from models.linear import Linear, calls, linears
from tests.models.drawn import drawn
from tests.models.language.small import CONFIGS, CPU, SEED, context, decoder, pack, plain_stream, stream, x_of

SITE = 1 << 18


@pytest.fixture
def triton() -> Iterator[None]:
    previous = set_backend("triton")
    yield
    set_backend(previous)


def with_lora(name: str, *targets: str, bits: int = 16, dropout: float = 0.0) -> Decoder:
    model = decoder(CONFIGS[name])
    if bits < 16:
        pack(model.blocks(), bits)
    model.add_lora(LoRAConfig(rank=3, alpha=6.0, dropout=dropout, targets=targets), SITE)
    for module in model.modules():
        if isinstance(module, LoRA):
            drawn(module)
    return model


def dense(linear: Linear) -> Tensor:
    weight = linear.frozen_weight()
    if isinstance(weight, Tensor):
        return weight.detach()
    if isinstance(weight, Int8Tensor):
        return dequantize_int8(weight, torch.float32)
    return dequantize_nf4_reference(weight, torch.float32)


def merged(model: Decoder) -> dict[str, Tensor]:
    """All weights by name, W + 2 B A where there is LoRA: a function of A and B."""
    weights = dict(model.named_parameters())
    for name, linear in model.named_modules():
        if isinstance(linear, Linear):
            update = 0.0 if linear.lora is None else 2.0 * linear.lora.b @ linear.lora.a
            weights[f"{name}.weight"] = cast(nn.Parameter, dense(linear) + update)
    return cast(dict[str, Tensor], weights)


CASES = [
    ("llama", ("attention.q", "attention.v")), ("phi", ("mlp.up", "mlp.down")), ("phi3", ("attention.qkv",)),
    ("phi3", ()), ("stablelm", ()), ("phi", ()),
]  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("name", "targets"), CASES, ids=str)
def test_it_is_the_merged_model(name: str, targets: tuple[str, ...], bits: int) -> None:
    model = with_lora(name, *targets, bits=bits)
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    number = len(targets) or sum(len(group) for group in model.blocks()[0].groups())
    assert len(learns) == 2 * 2 * number and all(map(is_adapter, learns))
    x, weight = x_of(), x_of(seed=2).detach()
    expected, found = plain_stream(model, x, merged(model)), stream(model, x, context(model, SEED))
    if model.config.residual_dropout:
        found = stream(model, x, context(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *learns.values()]) for y in (expected, found)]
    for n, a, b in zip(["x", *learns], *grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3, msg=lambda text, n=n: f"{n}: {text}")  # type: ignore[misc]


def layers_of(*with_update: bool, bits: int = 16, ranks: tuple[int, ...] = (2, 2, 2)) -> list[Linear]:
    layers = []
    for i, (has, rank) in enumerate(zip(with_update, ranks, strict=True)):
        layer = Linear(32, 16, bias=True)
        layer.lora = LoRA(32, 16, rank, 2.0, 0.5, SITE + sum(with_update[:i])) if has else None
        drawn(layer)
        for parameter in (layer.weight, layer.bias):
            assert parameter is not None
            parameter.requires_grad_(False)
        if bits < 16:
            assert layer.weight is not None
            layer.quantize(layer.weight.data, bits=bits, device=CPU, name="w")
        layers.append(layer)
    return layers


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("has", [(True, False, True), (True, True, True), (False, False, True)], ids=str)
def test_layers_on_one_x(has: tuple[bool, bool, bool], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, with dropout: a mask for each layer. Those with LoRA are one call."""
    counts: list[int] = []
    real = lora_linear.lora_down
    monkeypatch.setattr(lora_linear, "lora_down", lambda x, a, n, *rest: counts.append(n) or real(x, a, n, *rest))
    layers, x, y = layers_of(*has, bits=bits), x_of(), x_of()
    together = linears(x, *layers, seed=SEED)
    assert counts == [sum(has)]
    alone = []
    for layer in layers:
        out = y @ dense(layer).T + layer.bias
        if layer.lora is not None:
            kept = keep_mask(SEED, layer.lora.site, *y.shape, 0.5, CPU) / 0.5
            out = out + 2.0 * (y * kept) @ layer.lora.a.T @ layer.lora.b.T
        alone.append(out)
    learns = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    grads = []
    for outputs, start in ((together, x), (alone, y)):
        loss = sum((1 + i) * out.sin().sum() for i, out in enumerate(outputs))
        grads.append(torch.autograd.grad(cast(Tensor, loss), [start, *learns]))
    for a, b in zip((*together, *grads[0]), (*alone, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_unlike_neighbours_are_calls_of_their_own() -> None:
    """Of another rank, at a site that does not follow."""
    layers = layers_of(True, True, True, ranks=(2, 5, 5))
    assert layers[2].lora is not None
    layers[2].lora.site += 4
    assert calls(*layers) == [(layer,) for layer in layers]
    alone = [layer(x_of(), SEED) for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(linears(x_of(), *layers, seed=SEED), alone, strict=True))


def test_a_seed_is_a_mask() -> None:
    """Dropout of LoRA: the same numbers for one seed, others for another, none without; a bias of another dtype."""
    model = with_lora("stablelm", dropout=0.5)
    run = lambda seed: stream(model, x_of(), context(model, seed))  # noqa: E731
    assert torch.equal(run(SEED), run(SEED))
    assert not torch.equal(run(SEED), run(SEED + 1)) and not torch.equal(run(SEED), run(None))
    assert torch.equal(run(None), stream(with_lora("stablelm"), x_of(), context(model, SEED)))
    (layer,) = layers_of(True, ranks=(2,))
    assert layer.bias is not None
    layer.weight = nn.Parameter(dense(layer).half(), requires_grad=False)
    wide, x = layer(x_of().half()), x_of().half()
    layer.bias.data = layer.bias.data.half()
    assert wide.dtype == torch.float16 and torch.equal(wide, layer(x))
    torch.testing.assert_close(layer(x), layer.product(x) + layer.bias, rtol=2e-3, atol=2e-3)


def test_where_it_goes() -> None:
    some = with_lora("llama", "attention.q", "attention.v", "mlp.up").blocks()[0]
    attention, mlp = some.attention, some.mlp
    assert some.groups() == [
        (attention.k,), (attention.q, attention.v), (attention.o,), (mlp.gate,), (mlp.up,), (mlp.down,)
    ]  # fmt: skip
    model = with_lora("llama")
    assert [len(group) for group in model.blocks()[0].groups()] == [3, 1, 2, 1]
    assert not is_adapter("layers.0.mlp.up.weight") and is_adapter("layers.0.attention_adapter.down.bias")
    assert model.head.lora is None
    sites = [module.site for module in model.modules() if isinstance(module, LoRA)]
    assert sites == list(range(SITE, SITE + 14))
    assert {p.dtype for n, p in model.named_parameters() if is_adapter(n)} == {torch.float32}
    with pytest.raises(ValueError, match=r"query; there are attention\.q, .*mlp\.down$"):
        with_lora("llama", "query", "mlp.up")
    with pytest.raises(ValueError, match="head; there are"):
        with_lora("llama", "head")
    with pytest.raises(ValueError, match="1 to 256"):
        LoRAConfig(rank=257)
    with pytest.raises(ValueError, match="probability"):
        replace(LoRAConfig(), dropout=1.0)


def test_its_start_changes_nothing() -> None:
    model = with_lora("phi3")
    for module in model.modules():
        if isinstance(module, LoRA):
            module.reset()
            assert module.a.abs().max() <= module.a.shape[1] ** -0.5 and module.a.any()
    assert torch.equal(stream(model, x_of(), context(model)), stream(decoder(CONFIGS["phi3"]), x_of(), context(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["phi", "phi3", "stablelm"])
def test_in_a_16_bit_model(name: str, dtype: torch.dtype) -> None:
    """LayerNorms, MMA and LoRA in fp32 beside 16-bit linears: near the fp32 model, gradients in fp32."""
    found = []
    for narrow in (False, True):
        model = with_lora(name)
        model.add_adapters(AdapterConfig(dropout=0.0), "attn", 0)
        for module in model.modules():
            if isinstance(module, MMAdapter):
                drawn(module)
        for label, parameter in model.named_parameters():
            kept = is_adapter(label) or (model.config.norm_bias and "norm." in label)
            parameter.data = parameter.data if kept or not narrow else parameter.data.to(dtype)
        x = x_of().detach().to(dtype if narrow else torch.float32).requires_grad_()
        y = stream(model, x, context(model))
        learns = [p for n, p in model.named_parameters() if is_adapter(n)]
        grads = torch.autograd.grad(y.float().mean(), learns)
        assert y.dtype == x.dtype and all(grad.dtype == torch.float32 for grad in grads)
        found.append(torch.cat([part.flatten().float() for part in (y, *grads)]))
    assert (found[1] - found[0]).norm() <= 16 * torch.finfo(dtype).eps * found[0].norm()
