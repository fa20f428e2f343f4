"""Linear cross-entropy against torch's own expression, forward and backward, with either backend."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import linear_cross_entropy as module
from kernels import unpacked
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.int8 import dequantize_int8, quantize_int8
from kernels.linear_cross_entropy import (
    chunk_rows,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    scale_gradient,
)
from kernels.nf4 import quantize_nf4
from tests.kernels.tolerance import assert_within_twice

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANDOM_SHAPES = 200 if ON_GPU else 4


def expression(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The usual way: logits in the dtype of the head, then fp32 (fp64 for fp64)."""
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum()


def problem(
    rows: int, vocabulary: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, dim, device=device).to(dtype)
    weight = (torch.randn(vocabulary, dim, device=device) * 3 * dim**-0.5).to(dtype)
    weights = torch.rand(rows, device=device) / rows
    weights[1 + rows // 2 :: 3] = 0
    return hidden, weight, torch.randint(0, vocabulary, (rows,), device=device), weights


def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], frozen: bool, **options: int) -> list[Tensor]:
    """Loss and gradients, with the loss scale that fp16 trains with: without it torch's own gradient vanishes."""
    hidden, weight, labels, weights = inputs
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    loss = function(h, w, labels, weights, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 1024, [h] if frozen else [h, w])]


def check(inputs: tuple[Tensor, ...], frozen: bool, **options: int) -> None:
    """The rule: error at most twice that of torch's expression in the same dtype."""
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    ours = results(linear_cross_entropy, inputs, frozen, **options)
    values = zip(ours, results(expression, inputs, frozen), results(expression, exact, frozen), strict=True)
    for name, value in zip(("loss", "dhidden", "dweight"), values, strict=False):
        assert_within_twice(*value, name)


@pytest.fixture
def dtype(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    chosen: torch.dtype = request.param
    if backend == "triton" and chosen == torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter truncates bf16")
    return chosen


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(1, 97, 64), (33, 1000, 72), (17, 515, 80), (9, 32003, 64)], ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, frozen: bool, device: torch.device
) -> None:
    check(problem(*shape, dtype, device), frozen)


@pytest.mark.parametrize("vocabulary", [50295, 51200, 100352, 128257])
def test_the_vocabularies_of_the_models(triton_backend: None, vocabulary: int, device: torch.device) -> None:
    """Phi-2's without and with the rows that pad it, StableLM-2's, LLaMA-3's with a token more.

    Labels lie in the first, the middle and the last channel.
    """
    hidden, weight, *_ = problem(3, vocabulary, 16, torch.float16, device)
    weights = torch.tensor([0.2, 0.5, 0.3], device=device)
    labels = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=device)
    check((hidden, weight, labels, weights), frozen=True)


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:2], ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)

    def up_to(largest: int) -> int:
        return 1 + int(torch.randint(largest, (), generator=draw))

    for _ in range(RANDOM_SHAPES):
        vocabulary = 1 + up_to(131072 if ON_GPU else 9000)
        rows = up_to(min(4096, 2**24 // vocabulary) if ON_GPU else 12)
        dim = up_to(512 if ON_GPU else 96)
        budget = up_to(2**29)
        check(problem(rows, vocabulary, dim, dtype, device), frozen=up_to(2) == 1, memory_budget=budget)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen: bool) -> None:
    hidden, weight, labels, weights = (x.double() if x.is_floating_point() else x for x in problem(5, 11, 6))
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        assert torch.autograd.gradcheck(lambda h, w, f=function: f(h, w, labels, weights), (hidden, weight))


def test_chunks_do_not_show(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(140, 130, 32, device=device)
    whole = results(linear_cross_entropy, inputs, frozen=False, memory_budget=1)
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 128)
    for one, pieces in zip(whole, results(linear_cross_entropy, inputs, frozen=False, memory_budget=1), strict=True):
        torch.testing.assert_close(one, pieces, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [2**20, 2**28, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "pitch"), [(100, 128), (32000, 32000), (50295, 50304), (128256, 128256)])
def test_chunk_rows(vocabulary: int, pitch: int, dtype: torch.dtype, budget: int) -> None:
    rows = chunk_rows(vocabulary, dtype, budget)
    row_bytes = pitch * dtype.itemsize
    assert rows % 128 == 0
    assert rows == 1024 or (rows > 1024 and rows * row_bytes <= budget < (rows + 128) * row_bytes)


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, and alive at once at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in before | self.live.keys():
                self.live[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.live.pop, key)
        self.most = max(self.most, sum(self.live.values()))
        return out


def test_memory_stays_within_the_budget(
    triton_backend: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks in one buffer, and dhidden."""
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 128)
    inputs = problem(130, 4001, 16, torch.float16, device)
    budget = 128 * 4001 * 2
    with Peak() as peak:
        loss, dhidden = results(linear_cross_entropy, inputs, frozen=True, memory_budget=budget)
    assert budget <= peak.most - dhidden.nbytes <= 1.1 * budget
    assert torch.isfinite(loss)


@pytest.mark.skipif(not ON_GPU, reason="asks CUDA's allocator")
def test_memory_of_a_real_head(device: torch.device) -> None:
    """1,024 rows of the largest vocabulary fit the default budget."""
    budget = 256 * 2**20
    inputs = problem(3000, 128256, 256, torch.bfloat16, device)
    results(linear_cross_entropy, inputs, frozen=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(linear_cross_entropy, inputs, frozen=True)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize(("quantize", "dequantize"), [(quantize_nf4, dequantize_nf4), (quantize_int8, dequantize_int8)])
def test_packed_head_is_its_dequantized_weight(
    backend: str, quantize: Any, dequantize: Any, dtype: torch.dtype, device: torch.device
) -> None:
    hidden, weight, labels, weights = problem(20, 97, 48, dtype, device)
    packed, values = quantize(weight), []
    for head in (packed, dequantize(packed, dtype)):
        h = hidden.clone().requires_grad_()
        loss = linear_cross_entropy(h, head, labels, weights)
        values.append((loss, *torch.autograd.grad(loss, h)))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def biased(vocabulary: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Large enough to decide who is the largest."""
    generator = torch.Generator().manual_seed(vocabulary)
    return (3 * torch.randn(vocabulary, generator=generator)).to(device, dtype)


def with_bias(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], bias: Tensor, frozen: bool, **options: int
) -> list[Tensor]:
    """Loss and gradients of hidden, bias and, unless frozen, the head."""
    hidden, weight, labels, weights = inputs
    h, b, w = (x.detach().requires_grad_() for x in (hidden, bias, weight))
    loss = function(h, weight if frozen else w, labels, weights, bias=b, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 1024, [h, b] if frozen else [h, b, w])]


def biased_expression(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias.to(hidden.dtype)).to(torch.promote_types(hidden.dtype, torch.float32))
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum()


@pytest.mark.parametrize(
    ("shape", "wide_bias", "frozen"),
    [((33, 1000, 72), True, True), ((33, 1001, 72), False, False), ((5, 32003, 64), True, False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
def test_error_with_a_bias_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, wide_bias: bool, frozen: bool, device: torch.device
) -> None:
    inputs, bias = problem(*shape, dtype, device), biased(shape[1], dtype, device)
    if wide_bias:
        bias = bias.float()
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    ours = with_bias(linear_cross_entropy, inputs, bias, frozen)
    theirs = with_bias(biased_expression, inputs, bias, frozen)
    truth = with_bias(biased_expression, exact, bias.double(), frozen)
    for name, *values in zip(("loss", "dhidden", "dbias", "dweight"), ours, theirs, truth, strict=False):
        assert_within_twice(*values, name)
    assert ours[2].dtype == bias.dtype


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck_of_a_bias(frozen: bool) -> None:
    hidden, weight, labels, weights = (x.double() if x.is_floating_point() else x for x in problem(5, 11, 6))
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen), biased(11, torch.float64).requires_grad_()
    expected = biased_expression(hidden, weight, labels, weights, leaves[2])
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.testing.assert_close(function(hidden, weight, labels, weights, bias=leaves[2]), expected)
        assert torch.autograd.gradcheck(lambda h, w, b, f=function: f(h, w, labels, weights, bias=b), leaves)


@pytest.mark.parametrize("vocabulary", [97, 96])
def test_a_bias_of_zeros_changes_no_bit(backend: str, vocabulary: int, device: torch.device) -> None:
    inputs = problem(12, vocabulary, 48, torch.float16, device)
    plain = results(linear_cross_entropy, inputs, False)
    for dtype in (torch.float16, torch.float32):
        loss, dhidden, dbias, dweight = with_bias(
            linear_cross_entropy, inputs, torch.zeros(vocabulary, dtype=dtype, device=device), False
        )
        assert all(map(torch.equal, (loss, dhidden, dweight), plain))
        assert dbias.any()


def test_chunks_and_strides_of_a_bias_do_not_show(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, bias = problem(20, 130, 32, device=device), biased(130, torch.float32, device)
    whole = with_bias(linear_cross_entropy, inputs, bias, False, memory_budget=1)
    monkeypatch.setattr(module, "ROW_MULTIPLE", 8)
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 8)
    apart = torch.stack((bias, bias), 1)[:, 0]
    parts = with_bias(linear_cross_entropy, inputs, apart, False, memory_budget=1)
    for one, pieces in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, pieces, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_a_packed_head_with_a_bias(backend: str, quantize: Any, device: torch.device) -> None:
    inputs, bias = problem(20, 97, 48, torch.float16, device), biased(97, torch.float16, device)
    packed = quantize(inputs[1])
    dense = (
        dequantize_nf4(packed, torch.float16) if quantize is quantize_nf4 else dequantize_int8(packed, torch.float16)
    )
    hidden, _, labels, weights = inputs
    values = []
    for head in (packed, dense):
        h, b = hidden.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = linear_cross_entropy(h, head, labels, weights, bias=b)
        values.append((loss, *torch.autograd.grad(loss, (h, b))))
    assert all(map(torch.equal, *values))


def test_a_bias_that_learns_alone_and_one_that_is_frozen(backend: str, device: torch.device) -> None:
    inputs, bias = problem(20, 97, 48, device=device), biased(97, torch.float32, device)
    hidden, weight, labels, weights = inputs
    _, dhidden, dbias, _ = with_bias(linear_cross_entropy, inputs, bias, False)
    alone = linear_cross_entropy(hidden, weight, labels, weights, bias=bias.requires_grad_())
    assert torch.equal(torch.autograd.grad(alone * 1024, bias)[0], dbias)
    h = hidden.requires_grad_()
    frozen = linear_cross_entropy(h, weight, labels, weights, bias=bias.detach())
    assert torch.equal(torch.autograd.grad(frozen * 1024, h)[0], dhidden)


def test_no_rows_and_a_bias(backend: str, device: torch.device) -> None:
    loss, dhidden, dbias, dweight = with_bias(
        linear_cross_entropy, problem(0, 11, 8, device=device), biased(11, torch.float32, device), False
    )
    assert (loss.item(), dhidden.shape) == (0.0, (0, 8))
    assert not dbias.any() and not dweight.any()


def test_biases_that_are_refused(device: torch.device) -> None:
    hidden, weight, labels, weights = problem(5, 11, 6)
    for bias in (torch.zeros(10), torch.zeros(1, 11), torch.zeros(11, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"takes a bias \[11\] in float32 or torch.float32 .* got \(1"):
            linear_cross_entropy(hidden, weight, labels, weights, bias=bias)
    logits = torch.zeros(1, 16)[:, :11]
    row = torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.ones(()), torch.zeros(1)
    with pytest.raises(ValueError, match="11 elements and padding to a multiple of 8, got 11"):
        cross_entropy_rows(logits, *row, True, torch.zeros(11))


def test_packed_head_is_dequantized_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = problem(300, 97, 48)
    before = unpacked.counters.dequantisations
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 128)
    linear_cross_entropy(hidden.requires_grad_(), quantize_nf4(weight), labels, weights, memory_budget=1).backward()
    assert unpacked.counters.dequantisations == before + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str, indirect=True)
def test_trained_head_of_another_dtype(
    backend: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp32 head of a 16-bit model: its gradient is summed over the chunks and returned in fp32."""
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 128)
    hidden, weight, labels, weights = problem(130, 97, 48, dtype, device)
    _, _, dweight = results(linear_cross_entropy, (hidden, weight.float(), labels, weights), False, memory_budget=1)
    _, _, expected = results(expression, (hidden.float(), weight.float(), labels, weights), False)
    assert dweight.dtype == torch.float32
    assert (dweight - expected).norm() < 0.01 * expected.norm()


def test_fp16_gradient_survives_a_large_denominator(backend: str, device: torch.device) -> None:
    """Weights of 1e-6 lie below fp16's normal range; the loss scale brings the gradient back."""
    hidden, weight, labels, _ = problem(24, 500, 32, torch.float16, device)
    weights = torch.full((24,), 1e-6, device=device)
    h, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (linear_cross_entropy(h, weight, labels, weights) * 65536).backward()
    (expression(wide, weight.double(), labels, weights.double()) * 65536).backward()
    assert h.grad is not None
    assert wide.grad is not None
    assert (h.grad - wide.grad).norm() < 2e-3 * wide.grad.norm()


def test_fp16_gradient_of_a_sure_row_of_small_weight_survives(backend: str, device: torch.device) -> None:
    """As torch's does, whose logits have a gradient that is multiplied by weight and loss scale."""
    _, weight, labels, _ = problem(32, 1000, 64, torch.float16, device)
    sure = 14 * weight[labels] / weight[labels].square().sum(1, keepdim=True)  # 14 is the label's logit
    weights = torch.full((32,), 1 / 128, device=device)
    weights[16:] = 1 / 20_000

    def small(function: Callable[..., Tensor], h: Tensor, *rest: Tensor) -> Tensor:
        h = h.clone().requires_grad_()
        return torch.autograd.grad(function(h, *rest) * 65536, h)[0][16:].double()

    exact = small(expression, sure.double(), weight.double(), labels, weights.double())
    error, allowed = (
        (small(function, sure, weight, labels, weights) - exact).norm()
        for function in (linear_cross_entropy, expression)
    )
    assert allowed < 0.1 * exact.norm()
    assert error <= 2 * allowed


def test_fp16_gradient_survives_a_large_factor(triton_backend: None, device: torch.device) -> None:
    """65,536 is infinite in fp16."""
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    big, small = torch.tensor(65536.0 * 4, device=device), torch.tensor(2.0**-18, device=device)
    assert torch.equal(scale_gradient(gradient, big, small, torch.float16), gradient)
    assert torch.equal(scale_gradient(gradient / 8, big, small / 4, torch.float32), gradient.float() / 32)


def test_large_logits_stay_finite(backend: str, device: torch.device) -> None:
    hidden = torch.tensor([[200.0], [-200.0], [1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[10.0], [-10.0], [0.0]], device=device)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0, 2], device=device), torch.ones(3, device=device))
    loss.backward()
    assert hidden.grad is not None
    assert loss.item() == pytest.approx(4000 + 10, abs=0.01)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_logit_that_is_not_finite_shows(backend: str, bad: float, device: torch.device) -> None:
    hidden, weight, labels, weights = problem(1, 300, 8, device=device)
    hidden[0, 3] = 1.0
    weight[(labels + 5) % 300, 3] = bad
    assert not torch.isfinite(linear_cross_entropy(hidden, weight, labels, weights))


def test_rows_of_weight_zero_do_not_count(backend: str, device: torch.device) -> None:
    hidden, weight, labels, weights = problem(30, 97, 48, device=device)
    h = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(h, weight, labels, weights)
    loss.backward()
    assert h.grad is not None
    assert (weights == 0).sum() > 3
    assert not h.grad[weights == 0].any()
    kept = weights > 0
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[kept], weight, labels[kept], weights[kept]))
    h.grad = None
    nothing = linear_cross_entropy(h, weight, labels, torch.zeros(30, device=device))
    nothing.backward()
    assert nothing.item() == 0.0
    assert not h.grad.any()


def rows_of(logits: Tensor, labels: list[int], weights: list[float], gradient: bool = True) -> tuple[Tensor, Tensor]:
    """Losses, and what stands in the logits afterwards."""
    result, device = logits.clone(), logits.device
    losses = torch.full((len(labels),), 7.0, device=device)
    on_device = torch.tensor(labels, device=device), torch.tensor(weights, device=device)
    cross_entropy_rows(result, *on_device, torch.tensor(max(weights), device=device), losses, gradient)
    return losses, result


def test_a_row_of_weight_zero_is_not_read(triton_backend: None, device: torch.device) -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0] = float("nan")
    losses, gradient = rows_of(logits, [3, 4], [0.0, 0.5])
    assert losses[0] == 0.0
    assert not gradient[0].any()
    torch.testing.assert_close(losses[1], 0.5 * F.cross_entropy(logits[1], torch.tensor(4, device=device)))


def test_a_label_outside_of_the_vocabulary_makes_the_loss_nan(triton_backend: None, device: torch.device) -> None:
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).to(device)
    losses, _ = rows_of(logits, [-100, 40, 2**32 + 5, 5], [1.0] * 4)
    assert torch.isnan(losses).tolist() == [True, True, True, False]


def test_without_a_gradient_the_logits_stay(triton_backend: None, device: torch.device) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(device)
    losses, after = rows_of(logits, [1, 2], [1.0, 0.0], gradient=False)
    assert torch.equal(after, logits)
    assert torch.equal(losses, rows_of(logits, [1, 2], [1.0, 0.0])[0])


def test_rows_that_overlap_are_refused(triton_backend: None, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8 elements, got strides \(97, 1\)"):
        rows_of(torch.zeros(2, 97, device=device), [0, 1], [1.0, 1.0])


@pytest.mark.parametrize("frozen", [True, False])
def test_no_rows(backend: str, frozen: bool, device: torch.device) -> None:
    loss, dhidden, *dweight = results(linear_cross_entropy, problem(0, 11, 8, device=device), frozen)
    assert (loss.item(), loss.dtype) == (0.0, torch.float32)
    assert dhidden.shape == (0, 8)
    assert frozen or not dweight[0].any()


def test_forward_only_where_no_gradient_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, weights = problem(10, 97, 48)
    asked: list[tuple[bool, bool]] = []
    compute = module._loss_and_gradients

    def spy(*args: Any) -> Any:
        asked.append(args[5:7])
        return compute(*args)

    monkeypatch.setattr(module, "_loss_and_gradients", spy)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(h, w, labels, weights)
    linear_cross_entropy(hidden, weight, labels, weights)
    linear_cross_entropy(h, weight, labels, weights)
    linear_cross_entropy(hidden, w, labels, weights)
    assert asked == [(False, False), (False, False), (True, False), (False, True)]


def test_strided_input_and_repeatability(backend: str, device: torch.device) -> None:
    hidden, weight, labels, weights = problem(20, 97, 48, device=device)
    twice = torch.stack((hidden, hidden), 1), torch.stack((labels, labels), 1), torch.stack((weights, weights), 1)
    first, second = (results(linear_cross_entropy, (hidden, weight, labels, weights), False) for _ in range(2))
    strided = (hidden.T.contiguous().T, weight.T.contiguous().T, twice[1][:, 0], twice[2][:, 0])
    others = (
        results(linear_cross_entropy, strided, False),
        results(linear_cross_entropy, (twice[0][:, 0], *strided[1:]), False),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b)


def test_the_graph_may_be_walked_twice(backend: str, device: torch.device) -> None:
    hidden, weight, labels, weights = problem(20, 97, 48, device=device)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, weights)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, labels, weights = problem(5, 11, 6)
    for bad in ((hidden[:, :5], labels, weights), (hidden, labels[:4], weights), (hidden, labels, weights[:, None])):
        with pytest.raises(ValueError, match=r"takes hidden \[L, 6\]"):
            linear_cross_entropy(bad[0], weight, *bad[1:])
