"""SwiGLU against torch's own expression, forward and backward, separate and packed, with either backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launches
from kernels.launches import ANY, Choice, Launch
from kernels.swiglu import swiglu, swiglu_packed, swiglu_reference
from tests.kernels.tolerance import assert_rounded_once, assert_within_twice

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4
NAMES = ("h", "dgate", "dup")


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def packed(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_packed(torch.cat((gate, up), dim=1))


def inputs(t: int, f: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """gate, up, dh."""
    generator = torch.Generator().manual_seed(t + f)
    return [torch.randn(t, f, generator=generator).mul(3).to(device, dtype) for _ in range(3)]


def results(function: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor, dh: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (gate, up)]
    h = function(*leaves)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh)]


def check(function: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor, dh: Tensor) -> None:
    ours, torchs = results(function, gate, up, dh), results(eager, gate, up, dh)
    truth = results(eager, gate.double(), up.double(), dh.double())
    for name, *values in zip(NAMES, ours, torchs, truth, strict=True):
        assert_within_twice(*values, f"{tuple(gate.shape)} {gate.dtype}: {name}")
        assert_rounded_once(values[0], values[2], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [swiglu, packed])
@pytest.mark.parametrize("shape", [(1, 2730), (127, 72), (33, 688), (3, 4304)], ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str,
    function: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    check(function, *inputs(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    tokens, channels = (4096, 16384) if device.type == "cuda" else (130, 400)
    for _ in range(RANDOM_SHAPES):
        t, f, kind = (int(torch.randint(high, (), generator=generator)) for high in (tokens, channels, 2))
        check((swiglu, packed)[kind], *inputs(1 + t, 1 + f, dtype, device))


@pytest.mark.parametrize("tile", [Launch(rows=1, cols=1024, warps=4), Launch(rows=1, cols=2048, warps=4)], ids=str)
def test_the_tiles_of_large_tensors(
    triton_backend: None, tile: Launch, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in ("swiglu_forward", "swiglu_backward"):
        monkeypatch.setitem(launches.LAUNCHES, kernel, (Choice(ANY, tile),))
    for function in (swiglu, packed):
        check(function, *inputs(5, 1300, torch.float16, device))


def test_gradcheck_of_the_reference() -> None:
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))
    assert torch.autograd.gradcheck(packed, (gate, up))  # fp64 is the reference's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_stay_finite(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    gate = torch.tensor([[-300.0, -100.0, 0.0, 100.0, 300.0]], dtype=dtype, device=device)
    h, dgate, dup = results(swiglu, gate, torch.ones_like(gate), torch.ones_like(gate))
    for tensor, expected in ((h, gate.clamp(min=0)), (dup, gate.clamp(min=0)), (dgate, gate.sign() / 2 + 0.5)):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-37)


def test_gate_and_up_are_saved_and_nothing_else(triton_backend: None, device: torch.device) -> None:
    gate, up = (torch.randn(5, 8, device=device, requires_grad=True) for _ in range(2))
    both = torch.randn(5, 16, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(gate, up)
        swiglu_packed(both)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in (gate, up, both)]


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    gate, up, dh = inputs(40, 96, torch.float32, device)
    gate, up, dh = gate[::2, :48], up[1::2, 48:], dh[:20, ::2]
    expected = results(eager, gate.contiguous(), up.contiguous(), dh.contiguous())
    for a, b in zip(results(swiglu, gate, up, dh), expected, strict=True):
        torch.testing.assert_close(a, b)
    both = torch.cat((gate, up, up), dim=1)[:, :96].requires_grad_()  # rows longer than 2F
    h = swiglu_packed(both)
    (gradient,) = torch.autograd.grad(h, both, dh)
    torch.testing.assert_close(h.detach(), expected[0])
    torch.testing.assert_close(gradient, torch.cat(expected[1:], dim=1))


def test_no_tokens(backend: str, device: torch.device) -> None:
    for function in (swiglu, packed):
        for tensor in results(function, *inputs(0, 24, torch.float16, device)):
            assert tensor.shape == (0, 24)


def test_reuse_takes_no_memory_and_allows_one_backward(triton_backend: None, device: torch.device) -> None:
    gate, up, dh = inputs(12, 24, torch.float32, device)
    _, *expected = results(eager, gate, up, dh)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    gate, up = (1 * leaf for leaf in leaves)
    h = swiglu(gate, up, reuse=True)
    gradients = torch.autograd.grad(h, (gate, up), dh, retain_graph=True)
    for gradient, over, exact in zip(gradients, (gate, up), expected, strict=True):
        torch.testing.assert_close(gradient, exact)
        assert gradient.data_ptr() == over.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(h, leaves, dh)

    both = 1 * torch.cat(leaves, dim=1)
    h = swiglu_packed(both, reuse=True)
    (gradient,) = torch.autograd.grad(h, both, dh, retain_graph=True)
    torch.testing.assert_close(gradient, torch.cat(expected, dim=1))
    assert gradient.data_ptr() == both.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(h, leaves, dh)


def test_without_reuse_the_inputs_stay_and_a_second_backward_is_the_same(backend: str, device: torch.device) -> None:
    gate, up, dh = inputs(12, 24, torch.float32, device)
    before = gate.clone(), up.clone()
    h = swiglu(gate.requires_grad_(), up.requires_grad_())
    first, second = (torch.autograd.grad(h, (gate, up), dh, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, (gate, up), before))


def test_mismatch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must agree .*\(2, 3\) torch.float32 and \(2, 4\)"):
        swiglu(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="must agree"):
        swiglu(torch.randn(2, 3), torch.randn(2, 3).half())
    with pytest.raises(ValueError, match=r"\[T, 2F\], got \(2, 5\)"):
        swiglu_packed(torch.randn(2, 5))
