"""What layers keep for their backward pass changes no bit of outputs and gradients, in every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.dispatch import set_backend
from models.adapters.lora import LoRA, LoRAConfig
from models.adapters.mma import AdapterConfig, MMAdapter
from models.language.decoder import Decoder
from models.recompute import POLICIES, Policy
from tests.models.drawn import drawn
from tests.models.kept import kept_by, rows_kept
from tests.models.language.small import CONFIGS, FFN, SEED, TOKENS, context, decoder, pack, stream, x_of
from tests.models.shapes import DIM

D, F = DIM, FFN


@pytest.fixture
def triton() -> Iterator[None]:
    previous = set_backend("triton")
    yield
    set_backend(previous)


def adapted(name: str, how: str, *targets: str, layers: int = 2) -> Decoder:
    model = decoder(replace(CONFIGS[name], num_layers=layers))
    if "mma" in how:
        model.add_adapters(AdapterConfig(dropout=0.3), "attn", 0)
    if "lora" in how:
        model.add_lora(LoRAConfig(rank=2, dropout=0.3, targets=targets), 1 << 18)
    for module in model.modules():
        if isinstance(module, MMAdapter | LoRA):
            drawn(module)
    if "full" in how:
        for parameter in model.layers.parameters():
            parameter.requires_grad_()
    for layer in model.blocks():
        layer.drop_path = 0.3
    return model


def results(model: Decoder, policy: Policy, x: Tensor) -> list[Tensor]:
    for layer in model.blocks():
        layer.policy = policy
    learns = [p for p in model.parameters() if p.requires_grad]
    y = stream(model, x, context(model, SEED))
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *learns] if x.requires_grad else learns)]


@pytest.mark.parametrize("how", ["mma", "lora", "full", "mma and lora"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama of HF"])
def test_no_policy_changes_a_bit(name: str, how: str) -> None:
    model = adapted(name, how)
    for x in (x_of(), x_of().detach()):
        expected = results(model, "save_all", x)
        for policy in POLICIES[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results(model, policy, x), expected, strict=True)), policy
        assert all(value.any() for value in expected)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("name", "how", "targets"),
    [("phi", "mma and lora", ("attention.o", "mlp.down")), ("phi3", "lora", ("attention.qkv", "mlp.down"))],
    ids=str,
)
def test_nor_do_the_kernels(name: str, how: str, targets: tuple[str, ...]) -> None:
    model = adapted(name, how, *targets, layers=1)
    pack(model.blocks(), 4)
    expected = results(model, "save_all", x_of())
    for policy in POLICIES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results(model, policy, x_of()), expected, strict=True)), policy


@pytest.mark.parametrize("name", ["phi", "phi3"])
def test_the_last_products_are_not_computed_again(name: str) -> None:
    """With LoRA on them alone, too, and on an input that wants no gradient."""
    model = adapted(name, "lora", "mlp.down", "attention.o")
    x = x_of().detach()
    expected, calls = results(model, "save_all", x), Counter[str]()
    for label, layer in model.named_modules():
        layer.register_forward_hook(lambda *_, label=label: calls.update([label]))
    found = results(model, "keep_input", x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [calls[f"layers.{i}.mlp.down"] for i in (0, 1)] == [1, 1]
    assert calls["layers.1.attention.o"] == (1 if name == "phi" else 2)


# The stream, q, k, v, o; the norm that the MLP reads; what gelu reads. Behind an adapter that norm is computed again.
PHI_KEEPS: dict[tuple[str, Policy], dict[tuple[int, ...], int]] = {
    ("mma", "save_all"): {(TOKENS, D): 1, (TOKENS, 4, 8): 2, (TOKENS, 2, 8): 2, (TOKENS, F): 1},
    ("mma", "recompute_mlp"): {(TOKENS, D): 1, (TOKENS, 4, 8): 2, (TOKENS, 2, 8): 2},
    ("mma", "keep_input"): {(TOKENS, D): 1},
    ("frozen", "save_all"): {(TOKENS, D): 1, (TOKENS, 4, 8): 2, (TOKENS, 2, 8): 2, (TOKENS, F): 1},
    ("frozen", "recompute_mlp"): {(TOKENS, D): 2, (TOKENS, 4, 8): 2, (TOKENS, 2, 8): 2},
    ("frozen", "keep_input"): {(TOKENS, D): 1},
}


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("how", "policy"), PHI_KEEPS)
def test_what_a_parallel_block_keeps(how: str, policy: Policy) -> None:
    model = adapted("phi", how)
    pack(model.blocks(), 4)
    layer = model.blocks()[0]
    layer.policy, layer.drop_path = policy, 0.0
    x, delta, of = x_of(), x_of(seed=2), context(model, SEED)
    _, kept = kept_by(model, lambda: layer(x, delta, of))
    assert rows_kept(kept, TOKENS) == PHI_KEEPS[how, policy]
