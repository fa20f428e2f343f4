"""RMSNorm, alone and behind a residual add, against torch's own expression, with either backend."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.dispatch import recording
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tests.kernels.tolerance import assert_within_twice

EPS = 1e-5
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
SHAPES = [(1, 64), (33, 96), (5, 576), (1, 1100)]  # rows of one tile and of several, whole and ragged
RANDOM_SHAPES, TOKENS, WIDTHS = 4, 24, (17, 250, 300)
if torch.cuda.is_available():
    SHAPES += [(127, 1024), (257, 1152), (577, 2730), (729, 5120), (33, 8192), (2, 16384)]
    RANDOM_SHAPES, TOKENS, WIDTHS = 200, 4096, (17, 250, 1024, 1152, 2730, 5120, 16384)

Norm = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def ours(cast_before_weight: bool = True) -> Norm:
    return lambda x, delta, weight: add_rms_norm(x, delta, weight, EPS, cast_before_weight=cast_before_weight)


def torchs(cast_before_weight: bool = True) -> Norm:
    """LLaMA's expression or Gemma's; in fp64 they are one."""

    def norm(x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = x if delta is None else x + delta
        wide = stream.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        y = normed.to(x.dtype) * weight if cast_before_weight else normed * weight.to(wide.dtype)
        return stream, y.to(x.dtype)

    return norm


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x, delta, weight, and the gradients of stream and y."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    x, delta, dstream, dy = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    weight = 1 + torch.randn(shape[1], generator=generator, device=device) / 4
    return tuple(tensor.to(dtype) for tensor in (3 * x, delta, weight, dstream, dy))


def results(
    norm: Norm, x: Tensor, delta: Tensor | None, weight: Tensor, dstream: Tensor | None, dy: Tensor | None
) -> list[Tensor]:
    """stream, y and the gradients of x, delta, weight; without those of an absent delta or an unused weight."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, delta, weight)]
    outputs = norm(*leaves)
    used = [(output, grad) for output, grad in zip(outputs, (dstream, dy), strict=True) if grad is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    grads = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    return [*(output.detach() for output in outputs), *grads]


def assert_accurate(
    x: Tensor, delta: Tensor | None, weight: Tensor, dstream: Tensor | None, dy: Tensor | None, cast: bool = True
) -> None:
    arguments = (x, delta, weight, dstream, dy)
    exact = [None if tensor is None else tensor.double() for tensor in arguments]
    found, allowed, truth = (
        results(ours(cast), *arguments),
        results(torchs(cast), *arguments),
        results(torchs(), *exact),
    )
    for what, a, b, c in zip(("stream", "y", "gradient", "gradient", "gradient"), found, allowed, truth, strict=False):
        assert_within_twice(a, b, c, what)
    assert len(found) == len(allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, delta, weight, dstream, dy = inputs(shape, dtype, device)
    assert_accurate(x, delta, weight, dstream, dy)
    assert_accurate(x, None, weight, None, dy, cast=False)


@pytest.mark.parametrize("index", range(RANDOM_SHAPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, index: int, device: torch.device) -> None:
    choice = random.Random(index)
    x, delta, weight, dstream, dy = inputs((choice.randint(1, TOKENS), choice.choice(WIDTHS)), dtype, device)
    assert_accurate(
        x,
        choice.choice((delta, None)),
        weight.to(choice.choice((dtype, torch.float32))),
        choice.choice((dstream, None)),
        dy,
        cast=choice.choice((True, False)),
    )


@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "no delta"])
@pytest.mark.parametrize("used", ["stream", "y", "both"])
def test_gradients_of_either_output(backend: str, with_delta: bool, used: str, device: torch.device) -> None:
    x, delta, weight, dstream, dy = inputs((9, 96), torch.float16, device)
    assert_accurate(
        x, delta if with_delta else None, weight, None if used == "y" else dstream, None if used == "stream" else dy
    )


def test_the_stream_is_the_rounded_sum_or_x_itself(backend: str, device: torch.device) -> None:
    x, delta, weight, *_ = inputs((40, 96), torch.float16, device)
    stream, y = add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(stream, x + delta)
    assert torch.equal(y, rms_norm(stream, weight, EPS))  # statistics of the rounded stream
    stream, y = add_rms_norm(x.requires_grad_(), None, weight, EPS)
    assert stream.data_ptr() == x.data_ptr()
    assert torch.equal(y, rms_norm(x, weight, EPS))


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_rounded_before_the_weight_or_after(
    triton_backend: None, weight_dtype: torch.dtype, device: torch.device
) -> None:
    """The two orders give other fp16 values in every fifth place."""
    x, _, weight, *_ = inputs((64, 96), torch.float16, device)
    weight = weight.to(weight_dtype)
    for cast in (True, False):
        y = rms_norm(x, weight, EPS, cast_before_weight=cast)
        assert (y != rms_norm_reference(x, weight, EPS, cast_before_weight=cast)).float().mean() < 0.01
        assert (y != rms_norm_reference(x, weight, EPS, cast_before_weight=not cast)).float().mean() > 0.1


def test_strided_inputs_and_gradients(backend: str, device: torch.device) -> None:
    """Row strides of 192 and 195 channels, columns of any stride, and a gradient that is one row for all."""
    for width in (192, 195):
        x, delta, weight, dstream, dy = inputs((10, width), torch.float32, device)
        parts = x[::2, :96], delta[1::2, 1:97], weight[:96], dstream[::2, 96:192], dy[0, :96].expand(5, 96)
        expected = results(torchs(), *(part.contiguous() for part in parts))
        turned = [part if part.ndim == 1 else part.T.contiguous().T for part in parts]
        for found in (results(ours(), *parts), results(ours(), *turned)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_no_tokens(backend: str, device: torch.device) -> None:
    *outcome, dweight = results(ours(), *inputs((0, 64), torch.float32, device))
    assert all(tensor.shape == (0, 64) for tensor in outcome)
    assert torch.equal(dweight, torch.zeros(64, device=device))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_one_kernel_each_way_and_one_more_for_a_trained_weight(
    triton_backend: None, trained: bool, device: torch.device
) -> None:
    """And of all activations the backward keeps the stream alone."""
    x, delta, weight, dstream, dy = inputs((8, 64), torch.float32, device)
    launched: list[str] = []
    saved: list[Tensor] = []
    with (
        recording(lambda kernel, *_: launched.append(kernel.__name__)),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        outputs = add_rms_norm(x.requires_grad_(), delta, weight.requires_grad_(trained), EPS)
        torch.autograd.backward(outputs, (dstream, dy))
    assert launched == ["norm_forward_kernel", "norm_backward_kernel", *trained * ["norm_daffine_kernel"]]
    assert sum(tensor.numel() for tensor in saved) == 8 * 64 + 64 + 8  # stream, weight, rstd
    assert (weight.grad is not None) == trained


def test_a_frozen_input_costs_no_kernel(triton_backend: None, device: torch.device) -> None:
    x, _, weight, _, dy = inputs((8, 64), torch.float32, device)
    launched: list[str] = []
    with recording(lambda kernel, *_: launched.append(kernel.__name__)):
        rms_norm(x, weight.requires_grad_(), EPS).backward(dy)
    assert launched == ["norm_forward_kernel", "norm_daffine_kernel"]


def test_results_repeat_bit_for_bit(triton_backend: None, device: torch.device) -> None:
    arguments = inputs((130, 32), torch.float32, device)  # three chunks of tokens
    first, second = (results(ours(), *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_accurate(*arguments)


def test_gradcheck_of_the_reference() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, EPS), (x, weight))


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(4, 64)
    with pytest.raises(ValueError, match=r"\(4, 64\) and \(32,\)"):
        rms_norm(x, torch.zeros(32), EPS)
    with pytest.raises(ValueError, match=r"\(2, 4, 64\) and \(64,\)"):
        rms_norm(x.expand(2, 4, 64), torch.zeros(64), EPS)
    with pytest.raises(ValueError, match=r"\(4, 64\) torch.float32 wants a delta .* got \(3, 64\) torch.float32"):
        add_rms_norm(x, torch.zeros(3, 64), torch.zeros(64), EPS)
    with pytest.raises(ValueError, match=r"got \(4, 64\) torch.float16"):
        add_rms_norm(x, x.half(), torch.zeros(64), EPS)
