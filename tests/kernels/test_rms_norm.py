"""RMSNorm and LayerNorm against torch's own expression, forward and backward, with either backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_norm import layer_norm, layer_norm_reference
from kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_dweight, rms_norm_forward, rms_norm_reference
from tests.kernels.tolerance import assert_within_twice

EPS = 1e-5
SHAPES = [(1, 64), (127, 96), (257, 64), (33, 1024), (2, 1100)]  # 1100: whole rows in a wider tile
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """LLaMA's expression."""
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = 1 + torch.randn(shape[1], generator=generator) / 4
    return tuple(tensor.to(device, dtype) for tensor in (3 * x, weight, dy))


def results(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, dy = inputs(shape, dtype, device)
    ours = results(lambda x, w: rms_norm(x, w, EPS), x, weight, dy)
    torchs = results(eager, x, weight, dy)
    truth = results(exact, x.double(), weight.double(), dy.double())
    for what, a, b, c in zip(("y", "dx", "dweight"), ours, torchs, truth, strict=True):
        assert_within_twice(a, b, c, what)


def test_the_cast_comes_before_the_weight(triton_backend: None, device: torch.device) -> None:
    """As in LLaMA; the other order gives other fp16 values in every fifth place."""
    x, weight, _ = inputs((64, 96), torch.float16, device)
    y, expected = rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    other_order = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * weight.float()).half()
    assert (y != expected).float().mean() < 0.01
    assert (y != other_order).float().mean() > 0.1


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    wide_x, weight, wide_dy = inputs((40, 192), torch.float32, device)
    x, weight, dy = wide_x[::2, :96], weight[:96], wide_dy[1::2, 96:]
    ours = results(lambda x, w: rms_norm(x, w, EPS), x, weight, dy)
    expected = results(eager, x.contiguous(), weight, dy.contiguous())
    transposed = results(lambda x, w: rms_norm(x, w, EPS), x.T.contiguous().T, weight, dy.T.contiguous().T)
    for a, b, c in zip(ours, expected, transposed, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)


def test_no_tokens(backend: str, device: torch.device) -> None:
    x, weight, dy = inputs((0, 64), torch.float32, device)
    y, dx, dweight = results(lambda x, w: rms_norm(x, w, EPS), x, weight, dy)
    assert y.shape == dx.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros(64, device=device))


def test_a_frozen_weight_gets_no_gradient_and_costs_none(
    triton_backend: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, dy = inputs((8, 64), torch.float32, device)
    monkeypatch.setattr("kernels.rms_norm.rms_norm_dweight", None)  # calling it would raise
    x.requires_grad_()
    rms_norm(x, weight, EPS).backward(dy)
    assert x.grad is not None
    assert weight.grad is None


def test_results_repeat_bit_for_bit(triton_backend: None, device: torch.device) -> None:
    x, weight, dy = inputs((600, 64), torch.float32, device)  # three chunks of tokens
    first, second = (results(lambda x, w: rms_norm(x, w, EPS), x, weight, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_within_twice(first[2], results(eager, x, weight, dy)[2], (dy * exact(x, torch.ones(()))).double().sum(0))


def test_gradcheck_of_the_references() -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm_reference(x, w, b, EPS), (x, weight, bias))


def test_primitives_obey_torch_library(device: torch.device) -> None:
    x, weight, dy = inputs((5, 64), torch.float16, device)
    y, rstd = rms_norm_forward(x, weight, EPS)
    torch.library.opcheck(rms_norm_forward, (x, weight, EPS))
    torch.library.opcheck(rms_norm_backward, (dy, x, weight, rstd))
    torch.library.opcheck(rms_norm_dweight, (dy, x, rstd))
    assert y.dtype == torch.float16
    assert rstd.dtype == torch.float32


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(4, 64\) and \(32,\)"):
        rms_norm(torch.zeros(4, 64), torch.zeros(32), EPS)
    with pytest.raises(ValueError, match=r"\(4, 64\).*\(32,\) and \(64,\)"):
        layer_norm(torch.zeros(4, 64), torch.zeros(32), torch.zeros(64), EPS)
    with pytest.raises(ValueError, match=r"torch.float32 wants .* got torch.float16"):
        layer_norm(torch.zeros(4, 64), torch.zeros(64).half(), torch.zeros(64).half(), EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [torch.float32, None], ids=["fp32 affine", "same dtype"])
def test_layer_norm(dtype: torch.dtype, affine: torch.dtype | None, device: torch.device) -> None:
    x, weight, bias = inputs((127, 96), dtype, device)
    weight, bias = weight.to(affine or dtype), bias[0].to(affine or dtype)
    dy = inputs((127, 96), dtype, device)[0].flip(0)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (96,), weight.to(x.dtype), bias.to(x.dtype), EPS)

    values = []
    for function, tensors in (
        (lambda x, w, b: layer_norm(x, w, b, EPS), (x, weight, bias)),
        (torchs, (x, weight, bias)),
        (torchs, (x.double(), weight.double(), bias.double())),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        values.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for what, ours, allowed, truth in zip(("y", "dx", "dweight", "dbias"), *values, strict=True):
        assert_within_twice(ours, allowed, truth, what)


def test_fp32_parameters_of_a_layer_norm_keep_no_fp32_copy_of_the_activations(device: torch.device) -> None:
    x, weight, bias = inputs((127, 96), torch.float16, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer_norm(x.requires_grad_(), weight.float(), bias[0].float(), EPS)
    assert y.dtype == torch.float16
    assert {tensor.dtype for tensor in saved if tensor.numel() == x.numel()} == {torch.float16}
