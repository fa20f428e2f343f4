"""Several layers on one x in one call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.dispatch import set_backend
from kernels.rope import rope, rope_table
from kernels.swiglu import swiglu
from models.linear import Linear, linears, pack_of

CPU = torch.device("cpu")
TOKENS, HEADS, WIDTH = 5, 2, 16
DIM = HEADS * WIDTH


def layers_of(*bits: int, bias: bool = True) -> list[Linear]:
    """Layers [32, 32] with weights of their own, stored in so many bits."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for few in bits:
        layer, weight = Linear(DIM, DIM, bias=bias), torch.randn(DIM, DIM, generator=generator)
        if few < 16:
            layer.quantize(weight, bits=few, device=CPU, name="w")
        else:
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias:
            layer.bias = torch.nn.Parameter(torch.randn(DIM, generator=generator), requires_grad=False)
        layers.append(layer)
    return layers


def x_of() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    previous = set_backend(request.param)
    yield request.param
    set_backend(previous)


@pytest.mark.parametrize("bits", [(4, 4, 4), (8, 8), (16, 16, 16), (4, 8, 16), (4,)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_call_is_the_calls_of_each(bits: tuple[int, ...], bias: bool) -> None:
    layers, x, y = layers_of(*bits, bias=bias), x_of(), x_of()
    together, alone = linears(x, *layers), [layer(y) for layer in layers]
    assert len(together) == len(alone) and all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    for outputs in (together, alone):
        torch.stack([out.square().sum() for out in outputs]).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-4 * float(y.grad.abs().max()))


def test_packed_weights_in_their_order() -> None:
    layers = layers_of(4, 16, 8)
    assert pack_of(layers) == (layers[0].frozen_weight(), layers[2].frozen_weight())


@pytest.mark.parametrize("bits", [4, 8])
def test_results_may_be_written_over(bits: int, backend: str) -> None:
    """RoPE turns q and k in place, SwiGLU's backward writes over gate and up: as a LLaMA block does."""
    q_layer, k_layer, gate_layer, up_layer = layers_of(bits, bits, bits, bits, bias=False)
    cos, sin = rope_table(WIDTH, TOKENS, 10000.0)
    at = torch.arange(TOKENS, dtype=torch.int32)
    found = []
    for inplace in (True, False):
        x = x_of()
        q, k = (out.unflatten(-1, (HEADS, WIDTH)) for out in linears(x, q_layer, k_layer))
        q, k = rope(q, k, cos, sin, at, interleaved=True, inplace=inplace)
        gate, up = linears(x + (q * k).flatten(1), gate_layer, up_layer)
        y = swiglu(gate, up, reuse=inplace)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
