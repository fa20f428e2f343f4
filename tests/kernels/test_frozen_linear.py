"""What NF4 and int8 linears have in common, unpacked by the reference and by csrc."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch, library, unpacked
from kernels.dispatch import set_backend
from kernels.few_rows import set_few_rows
from kernels.frozen_linear import input_gradient, products
from tests.kernels.packed import KINDS, NF4, ON_GPU, Kind, expressions
from tests.kernels.packed import csrc as csrc
from tests.kernels.tolerance import assert_within_twice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIXTEEN = DTYPES[1:]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    unpacked.release()
    yield
    unpacked.release()


@pytest.fixture
def reference() -> Iterator[None]:
    previous = set_backend("reference")
    yield
    set_backend(previous)


def check(kind: Kind, x: Tensor, qs: list[Any], biases: list[Tensor | None]) -> None:
    """All y, and dx of random dy, with at most twice the error that torch makes in x's dtype."""
    leaf = x.detach().clone().requires_grad_()
    torch_leaf, exact_leaf = (x.detach().clone().requires_grad_() for _ in range(2))
    ours = kind.linears(leaf, qs, biases)
    expected, _ = expressions(kind, torch_leaf, qs, biases)
    _, exact = expressions(kind, exact_leaf, qs, biases)
    for i, (y, theirs, right) in enumerate(zip(ours, expected, exact, strict=True)):
        assert_within_twice(y, theirs, right, f"y{i}")
    dys = [torch.randn(y.shape).to(y) for y in ours]
    dx, dx_torch = torch.autograd.grad(ours, leaf, dys), torch.autograd.grad(expected, torch_leaf, dys)
    wide = [kind.reference(q, torch.float32).double() for q in qs]
    assert_within_twice(dx[0], dx_torch[0], sum(dy.double() @ w for dy, w in zip(dys, wide, strict=True)), "dx")


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 96, 64), (127, 33, 2730), (257, 4304, 48), (577, 64, 72)])
def test_error_is_torchs_own(
    kind: Kind, tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(tokens)
    q, bias = kind.draw(rows, columns, dtype, device), torch.randn(rows).to(device, dtype)
    check(kind, torch.randn(tokens, columns).to(device, dtype), [q], [bias])


@KINDS
@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("tokens", "columns"), [(3, 192), (64, 131), (65, 131), (129, 192)])
def test_error_is_torchs_own_on_csrc(
    kind: Kind, tokens: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Below and above the limit of the fused product; three weights, whose gradients of x are added in place."""
    torch.manual_seed(tokens)
    qs = [kind.draw(rows, columns, dtype, device) for rows in (40, 17, 33)]
    check(kind, torch.randn(tokens, columns).to(device, dtype), qs, [None, torch.randn(17).to(device, dtype), None])


@KINDS
@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("case", range(200 if ON_GPU else 3))
def test_random_shapes(kind: Kind, case: int, device: torch.device) -> None:
    torch.manual_seed(case)
    tokens, rows, columns = (
        int(torch.randint(1, most, ())) for most in ((400, 3000, 5000) if ON_GPU else (90, 50, 300))
    )
    dtype = SIXTEEN[case % 2]
    qs = [kind.draw(rows + i, columns, dtype, device) for i in range(1 + case % 3)]
    check(kind, torch.randn(tokens, columns).to(device, dtype), qs, [None] * len(qs))


@KINDS
def test_gradcheck(kind: Kind) -> None:
    torch.manual_seed(0)
    qs = [kind.draw(rows, 70, torch.float32, torch.device("cpu")) for rows in (5, 3)]
    biases = [torch.ones(5, dtype=torch.float64), None]
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kind.linears(x, qs, biases), x)


@KINDS
def test_no_activation_is_saved(kind: Kind, device: torch.device) -> None:
    q, x = kind.draw(32, 64, torch.float32, device), torch.randn(70, 64, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kind.linear(x * 1.0, q)
    assert [t.shape for t in saved] == []


@KINDS
@pytest.mark.usefixtures("csrc")
def test_batches_strides_and_nothing(kind: Kind, device: torch.device) -> None:
    torch.manual_seed(1)
    q = kind.draw(32, 64, torch.float16, device)

    def same(x: Tensor) -> None:
        y = kind.linear(x, q)
        expected, exact = expressions(kind, x, [q], [None])
        assert_within_twice(y, expected[0], exact[0], str(x.stride()))

    big = torch.randn(4, 30, 128).to(device, torch.float16)
    for x in (big[..., :64], big[:, -1:, 64:], big[:, :2, 1:65], big[0, :, ::2], big[0, 0, :64], big[:, :, :64].mT.mT):
        same(x)
    same(torch.randn(64, 9).to(device, torch.float16).T)
    before = unpacked.counters.dequantisations
    for shape in ((0, 64), (2, 0, 64)):
        empty = torch.randn(shape, device=device, dtype=torch.float16).requires_grad_()
        y = kind.linear(empty, q, torch.zeros(32, device=device, dtype=torch.float16))
        assert y.shape == (*shape[:-1], 32)
        y.sum().backward()
        assert empty.grad is not None
        assert empty.grad.shape == shape
    assert unpacked.counters.dequantisations == before


@KINDS
@pytest.mark.usefixtures("csrc")
def test_one_launch_that_reads_x_where_it_lies(
    kind: Kind, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied is only what has no unit stride, or batches that are no rows at one distance."""
    calls: list[tuple[object, ...]] = []
    launch = library.call
    monkeypatch.setattr(library, "call", lambda *args: (calls.append(args), launch(*args)))
    qs = [kind.draw(rows, 64, torch.float16, device) for rows in (8, 16, 8)]
    big = torch.randn(4, 20, 128, device=device).half()
    in_place = (big[0, :, 64:], big[:, -1:, :64], big[:1, :5, :64])
    for x in (*in_place, big[0, :, ::2], big[:, :5, :64]):
        kind.linears(x, qs)
        ((name, _, *arguments),) = calls
        assert name == f"nibble_linear_{kind.name}"
        assert (x.data_ptr() in arguments) == any(x is y for y in in_place), x.stride()
        calls.clear()
    kind.linears(big[..., :64], qs)
    assert [name for name, *_ in calls] == [f"nibble_dequantize_{kind.name}"]


@KINDS
@pytest.mark.usefixtures("csrc")
def test_bitwise_repeatable(kind: Kind, device: torch.device) -> None:
    torch.manual_seed(2)
    for tokens in (5, 127):
        q = kind.draw(129, 200, torch.float16, device)
        x = torch.randn(tokens, 200).to(device, torch.float16).requires_grad_()
        runs = [(y := kind.linear(x, q), torch.autograd.grad(y.square().sum(), x)[0]) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@KINDS
def test_one_dequantisation_for_all_that_share_x(kind: Kind, device: torch.device) -> None:
    qs = [kind.draw(rows, 64, torch.float32, device) for rows in (8, 4, 4)]
    x = torch.randn(70, 64, device=device, requires_grad=True)
    before = unpacked.counters.dequantisations
    ys = kind.linears(x, qs)
    torch.autograd.grad(ys, x, [torch.ones_like(y) for y in ys])
    assert unpacked.counters.dequantisations == before + 1  # the backward pass found them unpacked


@KINDS
def test_linears_one_after_another_share_the_buffer(kind: Kind, device: torch.device) -> None:
    torch.manual_seed(3)
    qs = [kind.draw(64, 64, torch.float32, device) for _ in range(3)]
    x = torch.randn(70, 64, device=device, requires_grad=True)
    y = plain = x
    for q in qs:
        y, plain = kind.linear(y, q).relu(), F.linear(plain, kind.reference(q, torch.float32)).relu()
    assert torch.equal(y, plain)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, plain)]
    assert torch.equal(*grads)


def test_dense_weights_pass_as_they_are(device: torch.device) -> None:
    """As lora_linear has them, which takes any storage, mixed too."""
    torch.manual_seed(4)
    q, dense = NF4.draw(8, 64, torch.float32, device), torch.randn(5, 64, device=device)
    x, matrix = torch.randn(70, 64, device=device), NF4.reference(q, torch.float32)
    ys = products(x, (dense, q), (None, None))
    assert torch.equal(ys[0], F.linear(x, dense))
    assert torch.equal(ys[1], F.linear(x, matrix))
    dx = input_gradient(ys, (dense, q))
    assert torch.equal(dx, (ys[0] @ dense).addmm_(ys[1], matrix))


@KINDS
def test_wrong_shapes_and_trained_biases_are_refused(kind: Kind, device: torch.device) -> None:
    q, x = kind.draw(8, 64, torch.float32, device), torch.randn(2, 64, device=device)
    with pytest.raises(ValueError, match=r"x has 63 columns, the (NF4|int8) weight"):
        kind.linear(torch.randn(2, 63, device=device), q)
    with pytest.raises(ValueError, match="frozen"):
        kind.linear(x, q, torch.zeros(8, device=device, requires_grad=True))
    for bias in (torch.zeros(7, device=device), torch.zeros(8, device=device, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"is \[8\] in x's torch.float32, got \["):
            kind.linear(x, q, bias)


@KINDS
@pytest.mark.usefixtures("csrc")
def test_decisions_are_said_once_with_their_reasons(
    kind: Kind, device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However prefill and decode take turns."""
    monkeypatch.setattr(dispatch, "_decisions", {})
    q = kind.draw(8, 64, torch.float16, device)
    set_few_rows(9)
    try:
        with caplog.at_level(logging.INFO, logger="nibble.kernels"):
            for rows in (100, 1, 100, 1):
                kind.linear(torch.zeros(rows, 64, dtype=torch.float16, device=device), q)
    finally:
        set_few_rows(None)
    assert [record.getMessage() for record in caplog.records] == [
        f"dequantize_{kind.name}: cuda (chosen explicitly)",
        f"linear_{kind.name}: cuda (above 9 rows: unpacked once for all that share x, then plain products)",
        f"few_rows_{kind.name}: cuda (up to 9 rows: the fused product; set_few_rows)",
    ]


@KINDS
def test_without_csrc_the_log_says_so(
    kind: Kind, reference: None, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_decisions", {})
    q = kind.draw(8, 64, torch.float16, device)
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        kind.linear(torch.zeros(1, 64, dtype=torch.float16, device=device), q)
    assert [record.getMessage() for record in caplog.records] == [
        f"dequantize_{kind.name}: reference (chosen explicitly)",
        f"few_rows_{kind.name}: reference (unpacked, then a plain product: the fused one is csrc's, for 16 bits and at "
        "most 4 weights)",
    ]
