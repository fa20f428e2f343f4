"""The projector MLP against torch's own expression, forward and backward, with either backend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import projector
from kernels.activation import Activation, activation_reference
from kernels.projector import projector_mlp, projector_mlp_reference
from tests.kernels.tolerance import assert_within_twice

ACTIVATIONS = get_args(Activation)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """Two linears in x's dtype, as under autocast; on fp64 tensors: the truth."""
    w1, b1, w2, b2 = (parameter.to(x.dtype) for parameter in (w1, b1, w2, b2))
    return F.linear(activation_reference(F.linear(x, w1, b1), activation), w2, b2)


def inputs(n: int, k: int, h: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """[x in dtype, w1, b1, w2, b2 in fp32] and dy."""
    generator = torch.Generator().manual_seed(n + k + h)
    shapes = [(n, k), (h, k), (h,), (d, h), (d,), (n, d)]
    x, w1, b1, w2, b2, dy = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [x.to(dtype), 2 * w1 / k**0.5, b1, w2 / h**0.5, b2], dy.to(dtype)


def results(
    function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, *args: Any, **more: Any
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, *args, **more)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(tensors: list[Tensor], dy: Tensor, activation: Any, **how: bool) -> None:
    ours = results(projector_mlp, tensors, dy, activation, **how)
    torchs = results(eager, tensors, dy, activation)
    truth = results(eager, [tensor.double() for tensor in tensors], dy.double(), activation)
    for what, *values in zip(NAMES, ours, torchs, truth, strict=True):
        assert_within_twice(*values, f"{activation} {[tuple(tensor.shape) for tensor in tensors]} {how}: {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 64, 48, 96), (127, 96, 130, 64), (6, 1024, 128, 96)], ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int, int, int], activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    check(*inputs(*shape, dtype, device), activation)


@pytest.mark.parametrize("own", [True, False], ids=["own", "cuBLAS"])
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
def test_every_way_through(triton_backend: None, own: bool, recompute: bool, device: torch.device) -> None:
    for dtype in DTYPES:
        check(*inputs(33, 72, 130, 40, dtype, device), "gelu", own=own, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    limits = (1500, 1300, 2600, 1300, 4, 2, 2) if device.type == "cuda" else (130, 100, 140, 100, 4, 2, 2)
    for _ in range(RANDOM_SHAPES):
        n, k, h, d, activation, own, recompute = (
            int(torch.randint(limit, (), generator=generator)) for limit in limits
        )
        tensors, dy = inputs(1 + n, 1 + k, 1 + h, 1 + d, dtype, device)
        check(tensors, dy, ACTIVATIONS[activation], own=bool(own), recompute=bool(recompute))


def saved_by(tensors: list[Tensor], **how: bool) -> list[tuple[int, ...]]:
    """Shapes of the saved tensors of tokens, [64, ...]."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        projector_mlp(*tensors, "gelu", **how)
    return sorted(tuple(tensor.shape) for tensor in saved if tensor.shape[0] == 64)


def test_only_x_and_the_preactivation_are_saved(triton_backend: None, device: torch.device) -> None:
    tensors, _ = inputs(64, 32, 48, 16, torch.float32, device)
    frozen = [tensor.detach().clone() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert saved_by(leaves) == [(64, 32), (64, 48)]
    assert saved_by(leaves, recompute=True) == [(64, 32)]
    assert saved_by([leaves[0], *frozen[1:]]) == [(64, 48)]
    assert saved_by([*frozen[:4], leaves[4]]) == []
    assert saved_by([*frozen[:3], leaves[3], frozen[4]], recompute=True) == [(64, 32)]


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
def test_each_tensor_may_be_frozen(
    triton_backend: None, recompute: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then costs nothing: no product for its gradient, no sums, no activation that only dw2 needs."""
    tensors, dy = inputs(20, 24, 32, 48, torch.float32, device)
    expected = results(eager, tensors, dy, "gelu")[1:]
    backward, weights = calls_of("bias_act_backward", monkeypatch), calls_of("weight_gradient", monkeypatch)
    for trained in product((False, True), repeat=5):
        if not any(trained):
            continue
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, trained, strict=True)]
        backward.clear()
        weights.clear()
        projector_mlp(*leaves, "gelu", recompute=recompute).backward(dy)
        for leaf, need, gradient in zip(leaves, trained, expected, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, gradient)
        _, w1, b1, w2, _ = trained
        assert len(weights) == w1 + w2
        assert len(backward) == any(trained[:3])
        for *_, a, _, with_dbias in backward:
            assert (a is not None, with_dbias) == (w2, b1)


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments with which kernels.projector calls its function `name` from now on."""
    function, calls = getattr(projector, name), []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(projector, name, counted)
    return calls


def test_16_bit_parameters(triton_backend: None, device: torch.device) -> None:
    tensors, dy = inputs(33, 24, 32, 48, torch.float16, device)
    check([tensor.half() for tensor in tensors], dy, "silu")


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    (x, w1, *rest), dy = inputs(30, 64, 32, 48, torch.float32, device)
    strided, dense = [x[::2, :32], w1[:, ::2], *rest], [x[::2, :32].contiguous(), w1[:, ::2].contiguous(), *rest]
    expected = results(eager, dense, dy[1::2].clone(), "silu")
    for how in ({}, {"own": True}):
        for a, b in zip(results(projector_mlp, strided, dy[1::2], "silu", **how), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_no_tokens(backend: str, device: torch.device) -> None:
    tensors, dy = inputs(0, 64, 32, 48, torch.float16, device)
    y, dx, *gradients = results(projector_mlp, tensors, dy, "gelu")
    assert y.shape == (0, 48)
    assert dx.shape == (0, 64)
    assert all(not gradient.any() for gradient in gradients)


def test_results_repeat_bit_for_bit(triton_backend: None, device: torch.device) -> None:
    tensors, dy = inputs(130, 64, 32, 48, torch.float16, device)
    first, second = (results(projector_mlp, tensors, dy, "gelu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_backward_is_the_same(triton_backend: None, device: torch.device) -> None:
    tensors, dy = inputs(20, 64, 32, 48, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    y = projector_mlp(*leaves, "gelu")
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation: str) -> None:
    shapes = ((3, 4), (5, 4), (5,), (2, 5), (2,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: projector_mlp_reference(*t, activation), tensors)


def test_wrong_arguments_are_named() -> None:
    w1, b1, w2, b2 = torch.zeros(8, 4), torch.zeros(8), torch.zeros(6, 8), torch.zeros(6)
    with pytest.raises(ValueError, match="activation got 'relu'; accepted: silu, gelu, gelu_tanh, quick_gelu"):
        projector_mlp(torch.zeros(2, 4), w1, b1, w2, b2, "relu")
    with pytest.raises(ValueError, match=r"got \(2, 5\), \(8, 4\)"):
        projector_mlp(torch.zeros(2, 5), w1, b1, w2, b2, "silu")
