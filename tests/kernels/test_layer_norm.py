"""LayerNorm, alone, behind a residual add and with two branches after it, against torch's own, with either backend."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import recording
from kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from tests.kernels.tolerance import assert_within_twice

EPS = 1e-5
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
SHAPES = [(1, 64), (33, 96), (5, 576), (1, 1100)]  # rows of one tile and of several, whole and ragged
RANDOM_SHAPES, TOKENS, WIDTHS = 4, 24, (17, 250, 300)
if torch.cuda.is_available():
    SHAPES += [(127, 1024), (257, 1152), (577, 2730), (729, 5120), (33, 8192), (2, 16384)]
    RANDOM_SHAPES, TOKENS, WIDTHS = 200, 4096, (17, 250, 1024, 1152, 2730, 5120, 16384)

Outputs = tuple[Tensor, ...]


def ours(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, branches: int) -> Outputs:
    return add_layer_norm(x, delta, weight, bias, EPS, branches=branches)


def torchs(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, branches: int) -> Outputs:
    stream = x if delta is None else x + delta
    y = F.layer_norm(stream, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)
    return stream, *branches * (y,)


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """x, delta, weight, bias; the gradients of stream, y and y."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    x, delta, *grads = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(5))
    weight, bias = (torch.randn(shape[1], generator=generator, device=device).to(dtype) for _ in range(2))
    return [3 * x + 1, delta, 1 + weight / 4, bias], grads


def results(norm: object, tensors: list[Tensor | None], grads: list[Tensor | None]) -> list[Tensor]:
    """The outputs and the gradients of `tensors` where they have one; outputs whose gradient is None are not used."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    outputs = norm(*leaves, branches=len(grads) - 1)
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    found = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    return [*(output.detach() for output in outputs), *found]


def assert_accurate(tensors: list[Tensor | None], grads: list[Tensor | None]) -> None:
    exact = [[None if x is None else x.double() for x in group] for group in (tensors, grads)]
    found, allowed, truth = results(ours, tensors, grads), results(torchs, tensors, grads), results(torchs, *exact)
    for i, (a, b, c) in enumerate(zip(found, allowed, truth, strict=True)):
        assert_within_twice(a, b, c, f"result {i}")


@pytest.mark.parametrize("affine", [torch.float32, None], ids=["fp32 affine", "same dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, affine: torch.dtype | None, device: torch.device
) -> None:
    (x, delta, weight, bias), (dstream, dy, dy2) = inputs(shape, dtype, device)
    weight, bias = weight.to(affine or dtype), bias.to(affine or dtype)
    assert_accurate([x, delta, weight, bias], [dstream, dy, dy2])
    assert_accurate([x, None, weight, bias], [None, dy])


@pytest.mark.parametrize("index", range(RANDOM_SHAPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, index: int, device: torch.device) -> None:
    choice = random.Random(index)
    (x, delta, weight, bias), (dstream, dy, dy2) = inputs(
        (choice.randint(1, TOKENS), choice.choice(WIDTHS)), dtype, device
    )
    affine = choice.choice((dtype, torch.float32))
    grads = choice.choice(([dstream, dy], [None, dy], [dstream, dy, dy2], [dstream, None, dy2], [dstream, dy, None]))
    assert_accurate([x, choice.choice((delta, None)), weight.to(affine), bias.to(affine)], grads)


@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "no delta"])
@pytest.mark.parametrize("used", ["stream", "y", "y2", "stream, y", "stream, y2", "y, y2", "stream, y, y2"])
def test_gradients_of_any_outputs(backend: str, with_delta: bool, used: str, device: torch.device) -> None:
    (x, delta, weight, bias), grads = inputs((9, 96), torch.float16, device)
    names = used.split(", ")
    grads = [grad if name in names else None for name, grad in zip(("stream", "y", "y2"), grads, strict=True)]
    assert_accurate([x, delta if with_delta else None, weight, bias], grads)


def test_the_stream_is_the_rounded_sum_or_x_itself(backend: str, device: torch.device) -> None:
    (x, delta, weight, bias), _ = inputs((40, 96), torch.float16, device)
    stream, y, again = add_layer_norm(x.requires_grad_(), delta, weight, bias, EPS, branches=2)
    assert torch.equal(stream, x + delta)
    assert torch.equal(y, layer_norm(stream, weight, bias, EPS))
    assert y.data_ptr() == again.data_ptr()
    stream, y = add_layer_norm(x, None, weight, bias, EPS)
    assert stream.data_ptr() == x.data_ptr()
    assert torch.equal(y, layer_norm(x, weight, bias, EPS))


@pytest.mark.parametrize("mean", [100.0, 3000.0])
def test_a_mean_far_above_the_deviation_does_not_cancel(backend: str, mean: float, device: torch.device) -> None:
    """mean(x^2) - mean^2 would leave no digit of the variance."""
    (x, _, weight, bias), (_, dy, _) = inputs((16, 250), torch.float32, device)
    assert_accurate([x + mean, None, weight, bias], [None, dy])


def test_fp32_parameters_are_not_rounded_to_the_activations_dtype(backend: str, device: torch.device) -> None:
    (x, _, weight, bias), _ = inputs((64, 96), torch.float16, device)
    weight, bias = weight.float() + 1e-4, bias.float() + 1e-4
    y = layer_norm(x, weight, bias, EPS)
    assert (y != layer_norm_reference(x, weight, bias, EPS)).float().mean() < 0.01
    assert (y != layer_norm(x, weight.half(), bias.half(), EPS)).float().mean() > 0.1


def test_strided_inputs_and_gradients(backend: str, device: torch.device) -> None:
    for width in (192, 195):
        (x, delta, weight, bias), (dstream, dy, dy2) = inputs((10, width), torch.float32, device)
        tensors = [x[::2, :96], delta[1::2, 1:97], weight[96:192], bias[::2][:96]]
        grads = [dstream[::2, 96:192], dy[0, :96].expand(5, 96), dy2[:5, 1:97]]
        expected = results(torchs, [x.contiguous() for x in tensors], [x.contiguous() for x in grads])
        turned = [x if x.ndim == 1 else x.T.contiguous().T for x in tensors]
        for found in (results(ours, tensors, grads), results(ours, turned, [x.T.contiguous().T for x in grads])):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_no_tokens(backend: str, device: torch.device) -> None:
    *outcome, dweight, dbias = results(ours, *inputs((0, 64), torch.float32, device))
    assert all(tensor.shape == (0, 64) for tensor in outcome)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("trained", ["", "weight", "bias", "weight, bias"])
def test_one_kernel_each_way_and_one_more_for_trained_parameters(
    triton_backend: None, trained: str, device: torch.device
) -> None:
    """And of all activations the backward keeps the stream alone, in its own dtype."""
    (x, delta, weight, bias), grads = inputs((8, 64), torch.float16, device)
    weight, bias = weight.float().requires_grad_("weight" in trained), bias.float().requires_grad_("bias" in trained)
    launched: list[str] = []
    saved: list[Tensor] = []
    with (
        recording(lambda kernel, *_: launched.append(kernel.__name__)),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        outputs = add_layer_norm(x.requires_grad_(), delta, weight, bias, EPS, branches=2)
        torch.autograd.backward(outputs, grads)
    assert launched == ["norm_forward_kernel", "norm_backward_kernel", *bool(trained) * ["norm_daffine_kernel"]]
    assert sorted((tuple(tensor.shape), tensor.dtype) for tensor in saved) == [
        ((8, 2), torch.float32), ((8, 64), torch.float16), ((64,), torch.float32)
    ]  # fmt: skip
    assert (weight.grad is not None, bias.grad is not None) == ("weight" in trained, "bias" in trained)


def test_results_repeat_bit_for_bit(triton_backend: None, device: torch.device) -> None:
    arguments = inputs((130, 32), torch.float32, device)  # three chunks of tokens
    first, second = (results(ours, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_accurate(*arguments)


def test_gradcheck_of_the_reference() -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (6,)))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm_reference(x, w, b, EPS), (x, weight, bias))


def test_what_does_not_fit_is_named() -> None:
    x, vector = torch.zeros(4, 64), torch.zeros(64)
    with pytest.raises(ValueError, match=r"got \(4, 64\), \(32,\) and \(64,\)"):
        layer_norm(x, torch.zeros(32), vector, EPS)
    with pytest.raises(ValueError, match=r"got \(2, 4, 64\), \(64,\) and \(64,\)"):
        layer_norm(x.expand(2, 4, 64), vector, vector, EPS)
    with pytest.raises(ValueError, match=r"torch.float32 wants .* got torch.float16"):
        layer_norm(x, vector.half(), vector.half(), EPS)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.float16"):
        layer_norm(x.half(), vector, vector.half(), EPS)
    with pytest.raises(ValueError, match=r"a delta of that shape and dtype, got \(4, 64\) torch.float16"):
        add_layer_norm(x, x.half(), vector, vector, EPS)
    with pytest.raises(ValueError, match="1 or 2 branches, got 3"):
        add_layer_norm(x, None, vector, vector, EPS, branches=3)
