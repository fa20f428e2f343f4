from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy as module
from kernels.int8 import dequantize_int8, quantize_int8
from kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy, linear_cross_entropy_reference
from kernels.nf4 import dequantize_nf4, quantize_nf4
from tests.kernels.tolerance import assert_within_twice


def expression(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The usual way: logits in the dtype of the head, then fp32 (fp64 for fp64)."""
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum()


def problem(rows: int, vocabulary: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, dim).to(dtype)
    weight = (torch.randn(vocabulary, dim) * 3 * dim**-0.5).to(dtype)
    weights = torch.rand(rows) / rows
    weights[rows // 2 :: 3] = 0
    return hidden, weight, torch.randint(0, vocabulary, (rows,)), weights


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary", "dim"), [(1, 97, 64), (127, 1000, 72), (257, 515, 80), (9, 32000, 64)])
def test_error_is_torchs_own(rows: int, vocabulary: int, dim: int, dtype: torch.dtype, frozen: bool) -> None:
    """With the loss scale that fp16 trains with: without it torch's own gradient vanishes."""
    hidden, weight, labels, weights = problem(rows, vocabulary, dim, dtype)
    results = []
    for function, to in ((linear_cross_entropy, dtype), (expression, dtype), (expression, torch.float64)):
        h, w = hidden.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_(not frozen)
        loss: Any = function(h, w, labels, weights)
        grads = torch.autograd.grad(loss * 1024, [h] if frozen else [h, w])
        results.append([loss.detach(), *grads])
    for name, *values in zip(("loss", "dhidden", "dweight")[: 2 if frozen else 3], *results, strict=True):
        assert_within_twice(*values, name)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen: bool) -> None:
    hidden, weight, labels, weights = (x.double() if x.is_floating_point() else x for x in problem(5, 11, 6))
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        assert torch.autograd.gradcheck(lambda h, w, f=function: f(h, w, labels, weights), (hidden, weight))


@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_do_not_show(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = problem(300, 130, 32)
    results = []
    for smallest in (1024, 128):
        monkeypatch.setattr(module, "SMALLEST_CHUNK", smallest)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss = linear_cross_entropy(h, w, labels, weights, memory_budget=1)
        results.append([loss.detach(), *torch.autograd.grad(loss, [h] if frozen else [h, w])])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("budget", [2**20, 2**28, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [100, 32000, 128256])
def test_chunk_rows(vocabulary: int, dtype: torch.dtype, budget: int) -> None:
    rows = chunk_rows(vocabulary, dtype, budget)
    row_bytes = vocabulary * (4 if dtype == torch.float32 else 6)
    assert rows % 128 == 0
    assert rows == 1024 or (rows > 1024 and rows * row_bytes <= budget < (rows + 128) * row_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "dequantize"), [(quantize_nf4, dequantize_nf4), (quantize_int8, dequantize_int8)])
def test_packed_head_is_its_dequantized_weight(quantize: Any, dequantize: Any, dtype: torch.dtype) -> None:
    hidden, weight, labels, weights = problem(20, 97, 48, dtype)
    packed = quantize(weight)
    h = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(h, packed, labels, weights)
    h2 = hidden.clone().requires_grad_()
    same = linear_cross_entropy(h2, dequantize(packed, dtype), labels, weights)
    assert torch.equal(loss, same)
    assert torch.equal(*torch.autograd.grad(loss, h), *torch.autograd.grad(same, h2))


def test_packed_head_is_dequantized_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = problem(300, 97, 48)
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return dequantize_nf4(*args)

    monkeypatch.setattr(module, "dequantize_nf4", counted)
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 128)
    linear_cross_entropy(hidden.requires_grad_(), quantize_nf4(weight), labels, weights, memory_budget=1).backward()
    assert calls == [1]


def test_trained_head_of_another_dtype() -> None:
    hidden, weight, labels, weights = problem(40, 97, 48, torch.bfloat16)
    master = weight.float().requires_grad_()
    linear_cross_entropy(hidden, master, labels, weights).backward()
    expected = torch.autograd.grad(expression(hidden.float(), w := weight.float().requires_grad_(), labels, weights), w)
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert (master.grad - expected[0]).norm() < 0.01 * expected[0].norm()


def test_fp16_gradient_survives_a_large_denominator() -> None:
    """Weights of 1e-6 lie below fp16's normal range; the loss scale brings the gradient back."""
    hidden, weight, labels, _ = problem(64, 500, 32, torch.float16)
    weights = torch.full((64,), 1e-6)
    h, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (linear_cross_entropy(h, weight, labels, weights) * 65536).backward()
    (expression(wide, weight.double(), labels, weights.double()) * 65536).backward()
    assert h.grad is not None
    assert wide.grad is not None
    assert (h.grad - wide.grad).norm() < 2e-3 * wide.grad.norm()


def test_large_logits_stay_finite() -> None:
    hidden = torch.tensor([[200.0], [-200.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[10.0], [-10.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0, 2]), torch.ones(3))
    loss.backward()
    assert hidden.grad is not None
    assert loss.item() == pytest.approx(4000 + 10, abs=0.01)
    assert torch.isfinite(hidden.grad).all()


def test_rows_of_weight_zero_do_not_count() -> None:
    hidden, weight, labels, weights = problem(30, 97, 48)
    h = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(h, weight, labels, weights)
    loss.backward()
    assert h.grad is not None
    assert (weights == 0).sum() > 3
    assert not h.grad[weights == 0].any()
    kept = weights > 0
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[kept], weight, labels[kept], weights[kept]))
    h.grad = None
    nothing = linear_cross_entropy(h, weight, labels, torch.zeros(30))
    nothing.backward()
    assert nothing.item() == 0.0
    assert not h.grad.any()


@pytest.mark.parametrize("frozen", [True, False])
def test_no_rows(frozen: bool) -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=not frozen)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.backward()
    assert (loss.item(), loss.dtype) == (0.0, torch.float32)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    assert frozen or not weight.grad.any()  # type: ignore[union-attr]


def test_forward_only_where_no_gradient_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = problem(9, 50, 8)
    asked: list[tuple[bool, bool]] = []
    compute = module._loss_and_gradients

    def spy(*args: Any) -> Any:
        asked.append(args[-2:])
        return compute(*args)

    monkeypatch.setattr(module, "_loss_and_gradients", spy)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(h, w, labels, weights)
    linear_cross_entropy(hidden, weight, labels, weights)
    linear_cross_entropy(h, weight, labels, weights)
    linear_cross_entropy(hidden, w, labels, weights)
    assert asked == [(False, False), (False, False), (True, False), (False, True)]


def test_strided_input_and_repeatability() -> None:
    hidden, weight, labels, weights = problem(60, 97, 48)
    strided = hidden.T.contiguous().T
    results = []
    for x in (hidden, hidden, strided):
        leaf = x.detach().requires_grad_()
        loss = linear_cross_entropy(leaf, weight, labels, weights)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    for a, b in zip(*results[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, labels, weights = problem(5, 11, 6)
    for bad in ((hidden[:, :5], labels, weights), (hidden, labels[:4], weights), (hidden, labels, weights[:, None])):
        with pytest.raises(ValueError, match=r"takes hidden \[L, 6\]"):
            linear_cross_entropy(bad[0], weight, *bad[1:])
