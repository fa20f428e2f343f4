"""The projector MLP against torch's own expression, forward and backward, with either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.projector import (
    Activation,
    activation_reference,
    bias_act_backward,
    bias_act_forward,
    projector_mlp,
    projector_mlp_reference,
)
from tests.kernels.tolerance import assert_within_twice

ACTIVATIONS = get_args(Activation)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """Two linears in x's dtype, as under autocast; on fp64 tensors: the truth."""
    w1, b1, w2, b2 = (parameter.to(x.dtype) for parameter in (w1, b1, w2, b2))
    z = F.linear(x, w1, b1)
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    }
    return F.linear(acts[activation](z), w2, b2)


def inputs(n: int, k: int, h: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """[x in dtype, w1, b1, w2, b2 in fp32] and dy."""
    generator = torch.Generator().manual_seed(n + k + h)
    shapes = [(n, k), (h, k), (h,), (d, h), (d,), (n, d)]
    x, w1, b1, w2, b2, dy = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [x.to(dtype), 2 * w1 / k**0.5, b1, w2 / h**0.5, b2], dy.to(dtype)


def results(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, activation: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 64, 48, 96), (127, 96, 130, 64), (257, 64, 128, 64), (6, 1024, 128, 96)], ids=str
)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int, int, int], activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    tensors, dy = inputs(*shape, dtype, device)
    ours = results(projector_mlp, tensors, dy, activation)
    torchs = results(eager, tensors, dy, activation)
    truth = results(eager, [tensor.double() for tensor in tensors], dy.double(), activation)
    for what, a, b, c in zip(NAMES, ours, torchs, truth, strict=True):
        assert_within_twice(a, b, c, what)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation: str, device: torch.device) -> None:
    """Value and derivative in fp32, tails included: no overflow, no cancellation beyond torch's."""
    z = torch.linspace(-100, 100, 16 * 1280, device=device).view(16, 1280)
    zero, one = torch.zeros(1280, device=device), torch.ones_like(z)

    def value_and_slope(z: Tensor) -> list[Tensor]:
        z = z.detach().requires_grad_()
        a = activation_reference(z, activation)
        return [a.detach(), *torch.autograd.grad(a.sum(), z)]

    dz, a, _ = bias_act_backward(one, z, zero, activation)
    assert torch.equal(a, bias_act_forward(z, zero, activation))
    for ours, torchs, truth in zip((a, dz), value_and_slope(z), value_and_slope(z.double()), strict=True):
        near = z.abs() < 10  # beyond, ulps of 100 would hide everything
        assert_within_twice(ours[near], torchs[near], truth[near])
        assert_within_twice(ours, torchs, truth)


def test_only_x_and_the_preactivation_are_saved(triton_backend: None, device: torch.device) -> None:
    tensors, _ = inputs(64, 32, 48, 16, torch.float32, device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        projector_mlp(*leaves, "gelu")
    assert sorted(tensor.shape for tensor in saved if tensor.shape[0] == 64) == [(64, 32), (64, 48)]


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    (x, *parameters), dy = inputs(30, 64, 32, 48, torch.float32, device)
    strided = results(projector_mlp, [x[::2, :32], parameters[0][:, ::2], *parameters[1:]], dy[1::2], "silu")
    dense = results(
        projector_mlp,
        [x[::2, :32].contiguous(), parameters[0][:, ::2].contiguous(), *parameters[1:]],
        dy[1::2].clone(),
        "silu",
    )
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_no_tokens(backend: str, device: torch.device) -> None:
    tensors, dy = inputs(0, 64, 32, 48, torch.float16, device)
    y, dx, *gradients = results(projector_mlp, tensors, dy, "gelu")
    assert y.shape == (0, 48)
    assert dx.shape == (0, 64)
    assert all(not gradient.any() for gradient in gradients)


def test_a_frozen_projector_passes_the_gradient_on(backend: str, device: torch.device) -> None:
    (x, *parameters), dy = inputs(20, 64, 32, 48, torch.float32, device)
    expected = results(eager, [x, *parameters], dy, "gelu")[1]
    x.requires_grad_()
    projector_mlp(x, *parameters, "gelu").backward(dy)
    torch.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is None for parameter in parameters)


def test_results_repeat_bit_for_bit(triton_backend: None, device: torch.device) -> None:
    tensors, dy = inputs(300, 64, 32, 48, torch.float16, device)
    first, second = (results(projector_mlp, tensors, dy, "gelu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation: str) -> None:
    shapes = ((3, 4), (5, 4), (5,), (2, 5), (2,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: projector_mlp_reference(*t, activation), tensors)


def test_primitives_obey_torch_library(device: torch.device) -> None:
    z, da = (torch.randn(5, 48, dtype=torch.float16, device=device) for _ in range(2))
    bias = torch.randn(48, device=device)
    torch.library.opcheck(bias_act_forward, (z, bias, "gelu"))
    torch.library.opcheck(bias_act_backward, (da, z, bias, "silu"))


def test_wrong_arguments_are_named() -> None:
    w1, b1, w2, b2 = torch.zeros(8, 4), torch.zeros(8), torch.zeros(6, 8), torch.zeros(6)
    with pytest.raises(ValueError, match="activation got 'relu'; accepted: silu, gelu, gelu_tanh, quick_gelu"):
        projector_mlp(torch.zeros(2, 4), w1, b1, w2, b2, "relu")
    with pytest.raises(ValueError, match=r"got \(2, 5\), \(8, 4\)"):
        projector_mlp(torch.zeros(2, 5), w1, b1, w2, b2, "silu")
