from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8 import dequantize_int8, linear_int8, quantize_int8
from tests.kernels.tolerance import assert_within_twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (127, 2730), (33, 4304)])
def test_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]).to(dtype)
    weight[weight.abs().amax(1) == 0] = 1
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    q = quantize_int8(weight)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.scale, scale)
    assert torch.equal(dequantize_int8(q, torch.float32), functional.int8_vectorwise_dequant(codes, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(50, 300).to(dtype).float()
    error = (dequantize_int8(quantize_int8(weight.to(dtype)), torch.float32) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_zero_and_denormal_rows_are_harmless() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-45], [1e-37, -1e-37], [1.0, -0.5]])
    q = quantize_int8(weight)
    assert q.codes[0].tolist() == [0, 0]
    assert torch.allclose(dequantize_int8(q), weight, rtol=0.01, atol=1e-36)


def test_size_and_device() -> None:
    q = quantize_int8(torch.randn(10, 30, dtype=torch.bfloat16))
    assert (q.nbytes, q.shape, q.dtype) == (10 * 30 + 40, (10, 30), torch.bfloat16)
    assert q.to("meta").device.type == q.to("meta").scale.device.type == "meta"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named(value: float) -> None:
    weight = torch.randn(4, 6)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=rf"q\.weight: value {value} at \[2, 5\]"):
        quantize_int8(weight, "q.weight")


@pytest.mark.parametrize("weight", [torch.zeros(4, 4).long(), torch.zeros(8), torch.zeros(4, 0)])
def test_what_is_not_a_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="head: int8 takes"):
        quantize_int8(weight, "head")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 96, 64), (127, 33, 2730), (257, 4304, 48)])
def test_linear_error_is_torchs_own(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    q = quantize_int8((torch.randn(rows, columns) * columns**-0.5).to(dtype))
    x, bias, grad = (torch.randn(shape).to(dtype) for shape in ((tokens, columns), (rows,), (tokens, rows)))
    weight = dequantize_int8(q)
    ours, expression = (x.clone().requires_grad_() for _ in range(2))
    reference = x.double().requires_grad_()
    outs = (
        linear_int8(ours, q, bias),
        F.linear(expression, weight, bias),
        F.linear(reference, weight.double(), bias.double()),
    )
    assert_within_twice(*(y.detach() for y in outs), "y")
    for y in outs:
        y.backward(grad.to(y.dtype))
    assert ours.grad is not None
    assert expression.grad is not None
    assert reference.grad is not None
    assert_within_twice(ours.grad, expression.grad, reference.grad, "dx")


def test_linear_gradcheck() -> None:
    torch.manual_seed(0)
    q = quantize_int8(torch.randn(5, 9))
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear_int8(x, q), x)


def test_linear_saves_no_activation() -> None:
    q, saved = quantize_int8(torch.randn(8, 16)), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_int8(torch.randn(3, 16, requires_grad=True), q)
    assert not saved


def test_linear_refuses_wrong_width_and_trained_bias() -> None:
    q = quantize_int8(torch.randn(8, 16))
    with pytest.raises(ValueError, match="x has 15 columns"):
        linear_int8(torch.randn(2, 15), q)
    with pytest.raises(ValueError, match="frozen"):
        linear_int8(torch.randn(2, 16), q, torch.zeros(8, requires_grad=True))
