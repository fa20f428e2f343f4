from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dequantize_nf4 import dequantize_nf4
from kernels.linear_nf4 import linear_nf4
from kernels.nf4 import NF4Tensor, quantize_nf4
from tests.kernels.tolerance import assert_within_twice


def head(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> NF4Tensor:
    return quantize_nf4((torch.randn(rows, columns) * columns**-0.5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 96, 64), (127, 33, 2730), (257, 4304, 48), (577, 64, 72)])
def test_error_is_torchs_own(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    q, x, bias = head(rows, columns, dtype), torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    weight, grad = dequantize_nf4(q), torch.randn(tokens, rows).to(dtype)
    results = []
    for compute, wide in ((lambda x: linear_nf4(x, q, bias), False), (lambda x: F.linear(x, weight, bias), False),
                          (lambda x: F.linear(x, weight.double(), bias.double()), True)):  # fmt: skip
        leaf = (x.double() if wide else x).clone().requires_grad_()
        y = compute(leaf)
        y.backward(grad.to(y.dtype))
        results.append((y.detach(), leaf.grad))
    for ours, expression, reference in zip(*results, strict=True):
        assert_within_twice(ours, expression, reference)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    q = head(5, 70)
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear_nf4(x, q, torch.ones(5, dtype=torch.float64)), x)


def test_no_activation_is_saved() -> None:
    q, x = head(32, 64), torch.randn(7, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_nf4(x * 1.0, q)
    assert [t.shape for t in saved] == []


def test_strided_batched_and_empty_input() -> None:
    torch.manual_seed(1)
    q = head(32, 64)
    weight = dequantize_nf4(q)
    x = torch.randn(64, 9).T
    assert torch.equal(linear_nf4(x, q), F.linear(x, weight))
    assert linear_nf4(torch.randn(2, 3, 64), q).shape == (2, 3, 32)
    empty = torch.randn(0, 64, requires_grad=True)
    linear_nf4(empty, q).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 64)


def test_bitwise_repeatable() -> None:
    torch.manual_seed(2)
    q, x = head(129, 200), torch.randn(127, 200, requires_grad=True)
    runs = [(y := linear_nf4(x, q), torch.autograd.grad(y.square().sum(), x)[0]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_wrong_width_and_trained_bias_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 63 columns"):
        linear_nf4(torch.randn(2, 63), head(8, 64))
    with pytest.raises(ValueError, match="frozen"):
        linear_nf4(torch.randn(2, 64), head(8, 64), torch.zeros(8, requires_grad=True))
