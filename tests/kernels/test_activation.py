"""Bias and activation against torch's own expressions, forward and backward, with either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import (
    Activation,
    activation_reference,
    bias_act,
    bias_act_backward,
    bias_act_forward,
    bias_act_reference,
)
from tests.kernels.tolerance import assert_within_twice

ACTIVATIONS = get_args(Activation)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def eager(z: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """In z's dtype; on fp64 tensors: the truth."""
    return ACTS[activation](z if bias is None else z + bias.to(z.dtype))


def inputs(t: int, h: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """z and da in dtype, bias in fp32."""
    generator = torch.Generator().manual_seed(t + h)
    z, da, bias = (torch.randn(shape, generator=generator).to(device) for shape in ((t, h), (t, h), (h,)))
    return (2 * z).to(dtype), da.to(dtype), bias


def results(function: Any, z: Tensor, bias: Tensor | None, da: Tensor, *arguments: Any) -> list[Tensor]:
    """a, dz and, of a bias that is not None, dbias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (z, bias) if tensor is not None]
    a = function(leaves[0], leaves[1] if bias is not None else None, *arguments)
    return [a.detach(), *torch.autograd.grad(a, leaves, da)]


def check(z: Tensor, bias: Tensor | None, da: Tensor, activation: Any) -> None:
    ours = results(bias_act, z, bias, da, activation)
    torchs = results(eager, z, bias, da, activation)
    truth = results(eager, z.double(), None if bias is None else bias.double(), da.double(), activation)
    for what, *values in zip(("a", "dz", "dbias"), ours, torchs, truth, strict=False):
        assert_within_twice(*values, f"{activation} {tuple(z.shape)} {z.dtype}: {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 64), (127, 130), (3, 2730)], ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int], activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    z, da, bias = inputs(*shape, dtype, device)
    check(z, bias, da, activation)
    check(z, None, da, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    tokens, channels = (4096, 16384) if device.type == "cuda" else (130, 300)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(RANDOM_SHAPES):
        t, h, kind = 1 + below(tokens), 1 + below(channels), below(3)
        z, da, bias = inputs(t, h, dtype, device)
        check(z, (None, bias, bias.to(dtype))[kind], da, ACTIVATIONS[below(4)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation: str, device: torch.device) -> None:
    """Value and derivative in fp32, tails included: no overflow, no cancellation beyond torch's."""
    z = torch.linspace(-100, 100, 16 * 1280, device=device).view(16, 1280)
    one, dz, a = torch.ones_like(z), torch.empty_like(z), torch.empty_like(z)

    def value_and_slope(z: Tensor) -> list[Tensor]:
        z = z.detach().requires_grad_()
        a = activation_reference(z, activation)
        return [a.detach(), *torch.autograd.grad(a.sum(), z)]

    bias_act_backward(one, z, None, dz, a, activation, False)
    assert torch.equal(a, bias_act_forward(z, None, activation))
    for ours, torchs, truth in zip((a, dz), value_and_slope(z), value_and_slope(z.double()), strict=True):
        near = z.abs() < 10  # beyond, ulps of 100 would hide everything
        assert_within_twice(ours[near], torchs[near], truth[near])
        assert_within_twice(ours, torchs, truth)


def test_gelu_is_exact_to_the_rounding_of_fp32(device: torch.device) -> None:
    """Phi(z) within 2^-22, a unit in the last place being 2^-23 near 1; far tails are zero and not the polynomial's."""
    z = torch.linspace(-8, 8, 4096, device=device).view(4, 1024)
    a = bias_act_forward(z, None, "gelu")
    phi = torch.special.ndtr(z.double())
    assert ((a.double() - z.double() * phi).abs() <= z.double().abs() * 2.0**-22).all()
    far = torch.tensor([[-3e38, -1e9, -65504.0, -30.0, 30.0, 65504.0, 3e38]], device=device)
    assert torch.equal(bias_act_forward(far, None, "gelu"), far.clamp(min=0))


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    wide_z, wide_da, bias = inputs(40, 192, torch.float32, device)
    z, da, bias = wide_z[::2, :96], wide_da[1::2, 96:], bias[::2]
    expected = results(eager, z.contiguous(), bias, da.contiguous(), "gelu")
    strided = results(bias_act, z, bias, da, "gelu")
    transposed = results(bias_act, z.T.contiguous().T, bias, da.T.contiguous().T, "gelu")
    for a, b, c in zip(strided, transposed, expected, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_no_tokens(backend: str, device: torch.device) -> None:
    z, da, bias = inputs(0, 64, torch.float16, device)
    a, dz, dbias = results(bias_act, z, bias, da, "silu")
    assert a.shape == dz.shape == (0, 64)
    assert torch.equal(dbias, torch.zeros(64, device=device))


def test_a_frozen_bias_gets_no_gradient_and_costs_no_sums(
    triton_backend: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spy(*arguments: Any) -> Tensor:
        asked.append(arguments[-1])
        return bias_act_backward(*arguments)

    monkeypatch.setattr("kernels.activation.bias_act_backward", spy)
    z, da, bias = inputs(20, 64, torch.float32, device)
    (expected,) = torch.autograd.grad(eager(z.requires_grad_(), bias, "quick_gelu"), z, da)
    (dz,) = torch.autograd.grad(bias_act(z, bias, "quick_gelu"), z, da)
    torch.testing.assert_close(dz, expected)
    assert asked == [False]


def test_only_z_is_saved(triton_backend: None, device: torch.device) -> None:
    z, _, bias = inputs(20, 64, torch.float32, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        bias_act(z.requires_grad_(), bias, "gelu")
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() == z.numel()] == [z.data_ptr()]


def test_reuse_writes_the_gradient_over_z_and_allows_one_backward(triton_backend: None, device: torch.device) -> None:
    leaf, da, bias = inputs(20, 64, torch.float32, device)
    (expected,) = results(eager, leaf, bias, da, "gelu")[1:2]
    leaf.requires_grad_()
    z = 1 * leaf
    a = bias_act(z, bias, "gelu", reuse=True)
    (dz,) = torch.autograd.grad(a, z, da, retain_graph=True)
    torch.testing.assert_close(dz, expected)
    assert dz.data_ptr() == z.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(a, leaf, da)


def test_without_reuse_z_stays_and_a_second_backward_is_the_same(backend: str, device: torch.device) -> None:
    z, da, bias = inputs(20, 64, torch.float32, device)
    before = z.clone()
    a = bias_act(z.requires_grad_(), bias, "gelu")
    first, second = (torch.autograd.grad(a, z, da, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(z, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation: str) -> None:
    z, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(lambda z, b: bias_act_reference(z, b, activation), (z, bias))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation got 'relu'; accepted: silu, gelu, gelu_tanh, quick_gelu"):
        bias_act(torch.zeros(2, 4), None, "relu")
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(3,\)"):
        bias_act(torch.zeros(2, 4), torch.zeros(3), "silu")
    with pytest.raises(ValueError, match=r"got \(4,\) and None"):
        bias_act(torch.zeros(4), None, "silu")
