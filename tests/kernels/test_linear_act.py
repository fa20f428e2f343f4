"""Linear and activation against torch's own expression, by our own product and by cuBLAS, with either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launches
from kernels.activation import Activation, activation_reference
from kernels.dispatch import as_on_card, own_product
from kernels.launches import ANY, Choice, Launch, Products
from kernels.linear_act import linear_act, linear_act_forward, linear_act_reference, weight_gradient
from tests.kernels.tolerance import assert_within_twice

ACTIVATIONS = get_args(Activation)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4
NAMES = ("a", "dx", "dw", "dbias")


def eager(x: Tensor, w: Tensor, bias: Tensor, activation: str) -> Tensor:
    """In x's dtype, as under autocast; on fp64 tensors: the truth."""
    return activation_reference(F.linear(x, w.to(x.dtype), bias.to(x.dtype)), activation)


def inputs(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """[x in dtype, w, bias in fp32] and da in dtype."""
    generator = torch.Generator().manual_seed(m + k + n)
    x, w, bias, da = (torch.randn(s, generator=generator).to(device) for s in ((m, k), (n, k), (n,), (m, n)))
    return [x.to(dtype), 2 * w / k**0.5, bias], da.to(dtype)


def results(function: Callable[..., Tensor], tensors: list[Tensor], da: Tensor, *arguments: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    a = function(*leaves, *arguments)
    return [a.detach(), *torch.autograd.grad(a, leaves, da)]


def check(tensors: list[Tensor], da: Tensor, activation: Any, own: bool) -> None:
    ours = results(lambda *t: linear_act(*t, activation, own=own), tensors, da)
    torchs = results(eager, tensors, da, activation)
    truth = results(eager, [tensor.double() for tensor in tensors], da.double(), activation)
    for what, *values in zip(NAMES, ours, torchs, truth, strict=True):
        assert_within_twice(*values, f"{activation} {tuple(tensors[1].shape)} of {tuple(tensors[0].shape)}: {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own", "cuBLAS"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, activation: Activation, own: bool, dtype: torch.dtype, device: torch.device
) -> None:
    for shape in ((1, 64, 48), (127, 72, 130), (40, 77, 64)):  # 77: masked steps
        check(*inputs(*shape, dtype, device), activation, own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    limits = (1500, 1300, 4400, 4, 2) if device.type == "cuda" else (130, 150, 200, 4, 2)
    for _ in range(RANDOM_SHAPES):
        m, k, n, activation, even = (int(torch.randint(limit, (), generator=generator)) for limit in limits)
        k = 8 * (1 + k // 8) if even else 1 + k
        check(*inputs(1 + m, k, 1 + n, dtype, device), ACTIVATIONS[activation], own=True)


@pytest.mark.parametrize("tokens", [1, 16, 23])
def test_every_tile_is_computed_once_whatever_the_band(
    triton_backend: None, tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16 x 16: bands of 8 that are full, alone, and cut off."""
    monkeypatch.setitem(launches.LAUNCHES, "linear_act", (Choice(ANY, Launch(rows=16, cols=16, warps=4, inner=16)),))
    (x, w, bias), _ = inputs(16 * tokens - 3, 20, 45, torch.float32, device)
    a, z = linear_act_forward(x, w, bias, "silu", True)
    torch.testing.assert_close(z, x @ w.T)
    torch.testing.assert_close(a, F.silu(x @ w.T + bias))


def test_z_is_written_only_where_it_is_kept(triton_backend: None, device: torch.device) -> None:
    (x, w, bias), _ = inputs(33, 40, 50, torch.float16, device)
    w = w.half()
    kept, z = linear_act_forward(x, w, bias, "gelu", True)
    a, nothing = linear_act_forward(x, w, bias, "gelu", False)
    assert torch.equal(a, kept)
    assert (z.shape, nothing.shape) == ((33, 50), (0,))


def test_strided_input(triton_backend: None, device: torch.device) -> None:
    (x, w, bias), da = inputs(30, 64, 48, torch.float32, device)
    tensors = [x[::2, :32], w[:, ::2], bias.repeat_interleave(2)[::2]]
    dense = [tensor.contiguous() for tensor in tensors]
    for own in (True, False):
        for a, b in zip(
            results(lambda *t, own=own: linear_act(*t, "silu", own=own), tensors, da[1::2]),
            results(eager, dense, da[1::2], "silu"),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("own", [True, False], ids=["own", "cuBLAS"])
def test_no_tokens(backend: str, own: bool, device: torch.device) -> None:
    tensors, da = inputs(0, 64, 48, torch.float16, device)
    a, dx, dw, dbias = results(lambda *t: linear_act(*t, "gelu", own=own), tensors, da)
    assert (a.shape, dx.shape) == ((0, 48), (0, 64))
    assert not dw.any()
    assert not dbias.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_weight_has_its_dtype(dtype: torch.dtype, device: torch.device) -> None:
    dy, x = (torch.randn(33, n, device=device).to(dtype) for n in (20, 12))
    for weight in (torch.float32, torch.float16, torch.bfloat16):
        dw = weight_gradient(dy, x, weight)
        exact = dy.double().T @ x.double()
        assert dw.dtype == weight
        assert (dw.double() - exact).abs().max() <= 2e-6 * 33 + torch.finfo(weight).eps * exact.abs().max()


def test_a_frozen_weight_needs_no_x(triton_backend: None, device: torch.device) -> None:
    (x, w, bias), da = inputs(20, 64, 48, torch.float32, device)
    saved: list[Tensor] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        a = linear_act(x, w, bias, "gelu")
    assert sorted(tuple(tensor.shape) for tensor in saved) == [(20, 48), (48,), (48, 64)]  # z, bias, w
    (dx,) = torch.autograd.grad(a, x, da)
    torch.testing.assert_close(dx, torch.autograd.grad(eager(x, w, bias, "gelu"), x, da)[0])


def test_the_table_decides_by_card_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(576, 1024, dtype=torch.float16, device="meta")
    with as_on_card(80):
        assert not own_product(x, 4096)  # nothing has been measured
        rows = (Products(cards=(80, 86), m=(512, 4096), k=(1024, 1024), n=(1, 4096)),)
        monkeypatch.setattr("kernels.dispatch.OWN_PRODUCTS", rows)
        assert own_product(x, 4096)
        assert not own_product(x, 4097)
        assert not own_product(x[:511], 4096)
        assert not own_product(x[:, :512], 4096)
        assert not own_product(x.float(), 4096)
    with as_on_card(90):
        assert not own_product(x, 4096)


def test_the_table_is_obeyed(triton_backend: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, w, bias), _ = inputs(20, 64, 48, torch.float32, device)
    for own in (True, False):
        monkeypatch.setattr("kernels.linear_act.own_product", lambda *_, own=own: own)
        monkeypatch.setattr(
            "kernels.linear_act.bias_act_forward" if own else "kernels.linear_act.linear_act_forward", None
        )
        torch.testing.assert_close(linear_act(x, w, bias, "silu"), eager(x, w, bias, "silu"))
        monkeypatch.undo()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation: str) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(lambda *t: linear_act_reference(*t, activation), tensors)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation got 'relu'"):
        linear_act(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(8), "relu")
    with pytest.raises(ValueError, match=r"got \(2, 5\), \(8, 4\), \(8,\)"):
        linear_act(torch.zeros(2, 5), torch.zeros(8, 4), torch.zeros(8), "silu")
