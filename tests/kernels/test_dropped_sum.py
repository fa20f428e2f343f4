"""The sum of two branches through dropout: the masks of kernels/dropout.py, forward and backward, either backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.dropout import keep_mask
from kernels.dropped_sum import dropped_sum, dropped_sum_reference
from tests.kernels.tolerance import assert_rounded_once, assert_within_twice

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4
SEED, SITE, P = torch.tensor([-(2**40) - 77]), (1 << 17) + 6, 0.1
NAMES = ("y", "da", "db")


def inputs(t: int, d: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """a, b, dy."""
    generator = torch.Generator().manual_seed(t + d)
    return [torch.randn(t, d, generator=generator).to(device, dtype) for _ in range(3)]


def ours(a: Tensor, b: Tensor | None) -> Tensor:
    return dropped_sum(a, b, dropout=P, seed=SEED.to(a.device), site=SITE)


def expression(a: Tensor, b: Tensor | None) -> Tensor:
    """Masks that are ready, in the inputs' dtype throughout."""
    masks = (keep_mask(SEED, SITE + i, *a.shape, P, "cpu").to(a) / (1 - P) for i in range(2))
    y = a * next(masks)
    return y if b is None else y + b * next(masks)


def results(
    function: Callable[[Tensor, Tensor | None], Tensor], a: Tensor, b: Tensor | None, dy: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (a, b) if x is not None]
    y = function(*leaves, *(() if b is not None else (None,)))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(a: Tensor, b: Tensor | None, dy: Tensor) -> None:
    exact = [None if x is None else x.double() for x in (a, b)]
    truth = results(expression, exact[0], exact[1], dy.double())  # type: ignore[arg-type]
    for name, *values in zip(NAMES, results(ours, a, b, dy), results(expression, a, b, dy), truth, strict=False):
        assert_within_twice(*values, f"{tuple(a.shape)} {a.dtype}: {name}")
        assert_rounded_once(values[0], values[2], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2560), (65, 72), (9, 129)], ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int], branches: int, dtype: torch.dtype, device: torch.device
) -> None:
    a, b, dy = inputs(*shape, dtype, device)
    check(a, b if branches == 2 else None, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    tokens, channels = (4096, 5120) if device.type == "cuda" else (40, 150)
    for _ in range(RANDOM_SHAPES):
        t, d = (int(torch.randint(high, (), generator=generator)) for high in (tokens, channels))
        check(*inputs(1 + t, 1 + d, dtype, device))


def test_the_masks_are_those_of_the_two_sites(backend: str, device: torch.device) -> None:
    ones = torch.ones(37, 65, device=device)
    first, second = (keep_mask(SEED, SITE + i, 37, 65, P, device) for i in range(2))
    assert 0 < int(first.sum()) < first.numel()
    assert not torch.equal(first, second)
    assert torch.equal(ours(ones, None) > 0, first)
    assert torch.equal(ours(0 * ones, ones) > 0, second)
    _, da, db = results(ours, ones, ones, ones)
    assert torch.equal(da > 0, first)
    assert torch.equal(db > 0, second)


def test_strided_rows_and_gradient(backend: str, device: torch.device) -> None:
    a, b, dy = inputs(40, 96, torch.float32, device)
    a, b, dy = a[::2, :48], b[1::2, 48:], dy[:20, ::2]
    expected = results(ours, a.contiguous(), b.contiguous(), dy.contiguous())
    for one, two in ((a, b), (a.contiguous(), b), (a, b.contiguous()), (a.T.contiguous().T, b)):
        assert all(map(torch.equal, results(ours, one, two, dy), expected))


def test_places_of_64_bits_have_the_same_masks(
    triton_backend: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors that are too large for a test; these are told that they are."""
    a, b, dy = inputs(9, 40, torch.float32, device)
    expected = results(ours, a, b, dy)
    launched: list[object] = []
    monkeypatch.setattr("kernels.dropped_sum.ANY", 1)
    with dispatch.recording(lambda kernel, grid, config, args, constants: launched.append(constants["FAR"])):
        assert all(map(torch.equal, results(ours, a, b, dy), expected))
    assert launched == [True, True]


def test_no_tokens(backend: str, device: torch.device) -> None:
    a, b, dy = inputs(0, 24, torch.float16, device)
    assert [x.shape for x in results(ours, a, b, dy)] == [(0, 24)] * 3
    assert [x.shape for x in results(ours, a, None, dy)] == [(0, 24)] * 2


def test_gradcheck_of_the_reference() -> None:
    a, b = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: dropped_sum_reference(a, b, 0.3, SEED, 4), (a, b))


def test_one_launch_each_way_and_only_the_seed_is_saved(triton_backend: None, device: torch.device) -> None:
    a, b, _ = (x.requires_grad_() for x in inputs(5, 8, torch.float32, device))
    launched: list[str] = []
    saved: list[Tensor] = []
    with (
        dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__)),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        torch.autograd.grad(ours(a, b).sum(), (a, b))
        torch.autograd.grad(ours(a, b.detach()).sum(), a)
        torch.autograd.grad(ours(a.detach(), b).sum(), b)
    forward, backward = "dropped_sum_forward_kernel", "dropped_sum_backward_kernel"
    assert launched == [forward, backward, forward, forward, forward, forward]
    assert [x.numel() for x in saved] == [1, 1, 1]


def test_a_gradient_of_one_branch_alone(backend: str, device: torch.device) -> None:
    a, b, dy = inputs(9, 24, torch.float32, device)
    _, da, db = results(ours, a, b, dy)
    assert torch.equal(torch.autograd.grad(ours(a.requires_grad_(), b), a, dy)[0], da)
    assert torch.equal(torch.autograd.grad(ours(a.detach(), b.requires_grad_()), b, dy)[0], db)


def test_without_dropout_it_is_a_plain_sum(backend: str, device: torch.device) -> None:
    a, b, _ = inputs(9, 24, torch.float16, device)
    for options in ({"dropout": 0.0, "seed": SEED.to(device)}, {"dropout": P, "seed": None}):
        assert torch.equal(dropped_sum(a, b, site=0, **options), a + b)  # type: ignore[arg-type]
        assert dropped_sum(a, None, site=0, **options) is a  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"of one shape and dtype, got \(2, 3\) torch.float32, \(2, 4\)"):
        dropped_sum(a, b, dropout=P, seed=SEED, site=0)
    with pytest.raises(ValueError, match="of one shape and dtype"):
        dropped_sum(a, a.half(), dropout=P, seed=SEED, site=0)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1.0"):
        dropped_sum(a, a, dropout=1.0, seed=SEED, site=0)
    with pytest.raises(ValueError, match=r"seed int64 \[1\] and a site from 0 on, got torch.int32 \(1,\) and 0"):
        dropped_sum(a, a, dropout=P, seed=SEED.int(), site=0)
