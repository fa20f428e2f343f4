"""Norm + MMA adapter against torch's own expression, forward and backward, with either backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import keep_mask
from kernels.layer_norm import layer_norm
from kernels.norm_mma import add_norm_mma, norm_mma, norm_mma_reference
from kernels.rms_norm import rms_norm
from tests.kernels.tolerance import assert_within_twice

EPS = 1e-5
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES, TOKENS = (200, 4096) if torch.cuda.is_available() else (4, 24)
NAMES = ("y", "dx", "ddown_w", "ddown_b", "dup0_w", "dup0_b", "dup1_w", "dup1_b", "dmix")


@dataclass(frozen=True)
class Case:
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    adapter: list[Tensor]
    mix: Tensor
    row: Tensor | None
    dy: Tensor
    seed: Tensor | None = None
    scale: float = 0.7
    dropout: float = 0.0
    site: int = 1

    def double(self) -> Case:
        return replace(
            self,
            x=self.x.double(),
            norm_weight=self.norm_weight.double(),
            norm_bias=None if self.norm_bias is None else self.norm_bias.double(),
            adapter=[parameter.double() for parameter in self.adapter],
            mix=self.mix.double(),
            dy=self.dy.double(),
        )


def case(
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    layer: bool = False,
    routers: int | None = 2,
    h: int = 8,
    dropout: float = 0.0,
) -> Case:
    """routers None: every token its own."""
    generator = torch.Generator().manual_seed(tokens + channels + h)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    up = ((channels, h // 2), (channels,))
    adapter = [draw(*shape) / 3 for shape in ((h, channels), (h,), *up, *up)]
    adapter[0] = adapter[0] * 3 / channels**0.5
    row = None if routers is None else torch.randint(routers, (tokens,), generator=generator).to(device)
    return Case(
        x=(2 * draw(tokens, channels) + 0.5).to(dtype),
        norm_weight=(1 + draw(channels) / 4).to(dtype),
        norm_bias=draw(channels).to(dtype) if layer else None,
        adapter=adapter,
        mix=draw(tokens if routers is None else routers, 2).softmax(-1),
        row=row,
        dy=draw(tokens, channels).to(dtype),
        seed=torch.tensor([77], device=device) if dropout else None,
        dropout=dropout,
    )


def ours(c: Case, leaves: list[Tensor]) -> Tensor:
    x, *adapter, mix = leaves
    return norm_mma(
        x, c.norm_weight, c.norm_bias, EPS, *adapter, mix, c.row,
        scale=c.scale, dropout=c.dropout, seed=c.seed, site=c.site,
    )  # fmt: skip


def eager(c: Case, leaves: list[Tensor]) -> Tensor:
    """The expression in x's dtype, as under autocast; on fp64 tensors: the truth."""
    x, *adapter, mix = leaves
    down_w, down_b, up0_w, up0_b, up1_w, up1_b = (parameter.to(x.dtype) for parameter in adapter)
    norm_weight = c.norm_weight.to(x.dtype)
    if c.norm_bias is None:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        n = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * norm_weight
    else:
        n = F.layer_norm(x, x.shape[-1:], norm_weight, c.norm_bias.to(x.dtype), EPS)
    u = F.linear(n, down_w, down_b)
    if c.dropout:
        u = u * keep_mask(c.seed, c.site, *u.shape, c.dropout, u.device).to(u.dtype) / (1 - c.dropout)
    half, middle = u.shape[1] // 2, x.shape[1] // 2
    e = []
    for weight, bias in ((up0_w, up0_b), (up1_w, up1_b)):
        e.append(torch.cat((u[:, :half] @ weight[:middle].T, u[:, half:] @ weight[middle:].T), dim=1) + bias)
    m = (mix if c.row is None else mix[c.row]).to(x.dtype)
    return n + c.scale * (m[:, :1] * e[0] + m[:, 1:] * e[1])


def results(function: Callable[[Case, list[Tensor]], Tensor], c: Case) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (c.x, *c.adapter, c.mix)]
    y = function(c, leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, c.dy)]


def assert_accurate(c: Case) -> None:
    for what, a, b, truth in zip(NAMES, results(ours, c), results(eager, c), results(eager, c.double()), strict=True):
        assert_within_twice(a, b, truth, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shape", [(1, 64), (37, 96), (5, 1100)], ids=str)  # one tile a row, and several
def test_error_is_at_most_twice_that_of_torch(
    backend: str, shape: tuple[int, int], layer: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(case(*shape, dtype, device, layer=layer))


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_norm_parameters_in_fp32_beside_16_bit_activations(
    backend: str, layer: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """As in a tower. Rounding them first would give other values."""
    c = case(37, 96, dtype, device, layer=layer, routers=None)
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(96, generator=generator).to(device) for _ in range(2))
    wide = replace(c, norm_weight=weight, norm_bias=bias if layer else None)
    assert_accurate(wide)
    rounded = replace(c, norm_weight=weight.to(dtype), norm_bias=bias.to(dtype) if layer else None)
    assert (results(ours, wide)[0] != results(ours, rounded)[0]).float().mean() > 0.1
    flat = replace(wide, adapter=[*c.adapter[:2], *(torch.zeros_like(parameter) for parameter in c.adapter[2:])])
    plain = layer_norm(c.x, weight, bias, EPS) if layer else rms_norm(c.x, weight, EPS)
    assert (results(ours, flat)[0] != plain).float().mean() < 0.01  # one n for adapter, router and plain norm


@pytest.mark.parametrize(("layer", "dropout"), [(False, 0.1), (True, 0.5)])
def test_dropout(backend: str, layer: bool, dropout: float, device: torch.device) -> None:
    c = case(17, 96, torch.float32, device, layer=layer, dropout=dropout)
    assert_accurate(c)
    y = results(ours, c)[0]
    assert not torch.equal(y, results(ours, replace(c, dropout=0.0))[0])
    assert not torch.equal(y, results(ours, replace(c, site=2))[0])
    assert not torch.equal(y, results(ours, replace(c, seed=torch.tensor([78], device=device)))[0])
    plain = results(ours, replace(c, dropout=0.0))[0]
    assert torch.equal(plain, results(ours, replace(c, seed=None))[0])  # no seed, no dropout


@pytest.mark.parametrize("h", [2, 6, 12, 16])
def test_widths_of_the_code(backend: str, h: int, device: torch.device) -> None:
    assert_accurate(case(19, 66, torch.float32, device, h=h, dropout=0.25))


@pytest.mark.parametrize(("routers", "index"), [(None, torch.int64), (1, torch.int32), (7, torch.int64)], ids=str)
def test_routing(backend: str, routers: int | None, index: torch.dtype, device: torch.device) -> None:
    c = case(140, 64, torch.float32, device, routers=routers)  # two chunks of tokens
    assert_accurate(c if c.row is None else replace(c, row=c.row.to(index)))


def test_a_router_row_without_tokens_gets_a_zero_gradient(backend: str, device: torch.device) -> None:
    c = case(9, 64, torch.float32, device, routers=3)
    dmix = results(ours, replace(c, row=torch.ones_like(c.row)))[-1]
    assert not dmix[0].any()
    assert dmix[1].all()
    assert not dmix[2].any()


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_up_projections_leave_the_norm(
    backend: str, layer: bool, dtype: torch.dtype, device: torch.device
) -> None:
    c = case(40, 96, dtype, device, layer=layer)
    c = replace(c, adapter=[*c.adapter[:2], *(torch.zeros_like(parameter) for parameter in c.adapter[2:])])
    if c.norm_bias is None:
        plain = rms_norm(c.x, c.norm_weight, EPS)
    else:
        plain = layer_norm(c.x, c.norm_weight, c.norm_bias, EPS)
    y = results(ours, c)[0]
    assert (y != plain).float().mean() < (0.5 if dtype == torch.float32 else 0.01)  # last bits of the statistics
    torch.testing.assert_close(y, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    c = case(60, 128, torch.float32, device)
    part = case(30, 64, torch.float32, device)
    views = replace(
        part,
        x=c.x[::2, :64],
        dy=c.dy[1::2, 64:],
        adapter=[torch.stack((p, p), dim=-1)[..., 0] for p in part.adapter],
        mix=part.mix.T.contiguous().T,
        row=torch.stack((part.row, part.row), dim=-1)[..., 0],
    )
    dense = replace(part, x=views.x.contiguous(), dy=views.dy.contiguous())
    for a, b, transposed in zip(
        results(ours, views),
        results(ours, dense),
        results(ours, replace(dense, x=dense.x.T.contiguous().T, dy=dense.dy.T.contiguous().T)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(transposed, b)


@pytest.mark.parametrize("routers", [None, 2])
def test_no_tokens(backend: str, routers: int | None, device: torch.device) -> None:
    c = case(0, 64, torch.float16, device, routers=routers)
    y, dx, *gradients = results(ours, c)
    assert y.shape == dx.shape == (0, 64)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in (*c.adapter, c.mix)]
    assert all(not gradient.any() for gradient in gradients)


def test_a_frozen_adapter_costs_no_gradient(
    triton_backend: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case(12, 64, torch.float32, device)
    expected = results(eager, c)[1]
    monkeypatch.setattr("kernels.norm_mma.norm_mma_dadapter", None)  # calling it would raise
    monkeypatch.setattr("kernels.norm_mma.norm_mma_dmix", None)
    x = c.x.requires_grad_()
    ours(c, [x, *c.adapter, c.mix]).backward(c.dy)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("routers", [None, 2])
def test_gradcheck_of_the_reference(layer: bool, routers: int | None) -> None:
    c = case(3, 8, torch.float32, torch.device("cpu"), layer=layer, routers=routers, h=4, dropout=0.3).double()
    leaves = [tensor.requires_grad_() for tensor in (c.x, *c.adapter, c.mix)]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        *adapter, mix = rest
        return norm_mma_reference(
            x, c.norm_weight, c.norm_bias, EPS, adapter, mix, c.row, c.scale, c.dropout, c.seed, c.site
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)


def adding(c: Case, delta: Tensor, dstream: Tensor | None, dy: Tensor | None) -> list[Tensor]:
    """stream, y and the gradients of x and delta; an output without a gradient is one that nobody used."""
    x, delta = c.x.detach().requires_grad_(), delta.detach().requires_grad_()
    outputs = add_norm_mma(x, delta, c.norm_weight, c.norm_bias, EPS, *c.adapter, c.mix, c.row, scale=c.scale)
    used = [(output, grad) for output, grad in zip(outputs, (dstream, dy), strict=True) if grad is not None]
    gradients = torch.autograd.grad([output for output, _ in used], [x, delta], [grad for _, grad in used])
    return [output.detach() for output in outputs] + list(gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "channels"), [(False, 1100), (True, 96), (True, 1100)])
def test_residual_add(backend: str, layer: bool, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    c = case(19, channels, dtype, device, layer=layer)
    delta, dstream = c.dy.flip(0), c.dy.flip(1)
    stream, y, dx, ddelta = adding(c, delta, dstream, c.dy)
    assert torch.equal(stream, c.x + delta)
    assert torch.equal(dx, ddelta)
    leaves = [stream, *c.adapter, c.mix]
    exact = replace(c, x=stream).double()
    y_exact, dx_exact = results(eager, exact)[:2]
    assert_within_twice(y, eager(c, leaves), y_exact, "y")
    assert_within_twice(dx, results(eager, replace(c, x=stream))[1] + dstream, dx_exact + dstream.double(), "dx")


def test_gradients_of_the_residual_add_that_are_absent(backend: str, device: torch.device) -> None:
    c = case(19, 96, torch.float32, device)
    delta, dstream = c.dy.flip(0), c.dy.flip(1)
    stream, y, dx, _ = adding(c, delta, None, c.dy)
    alone = results(ours, replace(c, x=stream))
    assert torch.equal(y, alone[0])
    assert torch.equal(dx, alone[1])
    both = adding(c, delta, dstream, c.dy)[2]
    torch.testing.assert_close(both, dx + dstream)
    for gradient in adding(c, delta, dstream, None)[2:]:
        assert torch.equal(gradient, dstream)


def test_without_a_delta_the_stream_is_x(backend: str, device: torch.device) -> None:
    c = case(19, 96, torch.float32, device)
    x = c.x.requires_grad_()
    arguments = (c.norm_weight, c.norm_bias, EPS, *c.adapter, c.mix, c.row)
    stream, y = add_norm_mma(x, None, *arguments, scale=c.scale)
    assert stream.data_ptr() == x.data_ptr()
    assert torch.equal(y, norm_mma(x, *arguments, scale=c.scale))
    (dx,) = torch.autograd.grad((stream, y), x, (c.dy.flip(1), c.dy))
    torch.testing.assert_close(dx, results(ours, c)[1] + c.dy.flip(1))


@pytest.mark.parametrize("channels", [96, 1100])
def test_a_mean_far_from_zero_cancels_nothing(backend: str, channels: int, device: torch.device) -> None:
    """The variance of such a row is lost in mean(x^2) - mean^2; and a first channel that is far off moves the mean."""
    c = case(5, channels, torch.float32, device, layer=True)
    x = c.x + 3000.0
    x[:, 0] += 500.0
    assert_accurate(replace(c, x=x))


def test_small_gradients_in_fp16(triton_backend: None, device: torch.device) -> None:
    """Such that their product with rstd has no digits left in fp16."""
    c = case(19, 96, torch.float16, device)
    assert_accurate(replace(c, x=c.x * 100, dy=c.dy / 10000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(RANDOM_SHAPES):
        channels = 2 * (1 + below((64, 600, 8192)[below(3)] if torch.cuda.is_available() else 100))
        tokens = 1 + below(min(TOKENS, 2**23 // channels))
        drawn = case(
            tokens, channels, dtype, device, layer=below(2) == 1, routers=(None, 1 + below(40))[below(2)],
            h=2 * (1 + below(8)), dropout=(0.0, 0.1)[below(2)],
        )  # fmt: skip
        assert_accurate(drawn)


def test_wrong_arguments_are_named() -> None:
    c = case(4, 64, torch.float32, torch.device("cpu"))
    leaves = [c.x, *c.adapter, c.mix]

    def fails(pattern: str, changed: Case, tensors: list[Tensor] = leaves) -> None:
        with pytest.raises(ValueError, match=pattern):
            ours(changed, tensors)

    fails(r"adapter shapes.*\(8, 32\)", c, [c.x, c.adapter[0][:, :32], *leaves[2:]])
    fails("even code, got D 64, h 7", c, [c.x, c.adapter[0][:7], *leaves[2:]])
    fails(r"4 tokens mix got \(3, 2\) and row None", replace(c, row=None), [*leaves[:-1], torch.rand(3, 2)])
    fails(r"row \(3,\)", replace(c, row=torch.zeros(3, dtype=torch.int64)))
    fails(r"norm parameters must be \(64,\)", replace(c, norm_bias=torch.zeros(32)))
    fails("must be fp32.*torch.float16", c, [c.x, c.adapter[0].half(), *leaves[2:]])
    with pytest.raises(ValueError, match=r"delta must be as x, \(4, 64\) torch.float32, got \(4, 64\) torch.float16"):
        add_norm_mma(c.x, c.x.half(), c.norm_weight, None, EPS, *c.adapter, c.mix, c.row, scale=1.0)
    fails("keeps the norm frozen", replace(c, norm_weight=c.norm_weight.clone().requires_grad_()))
    fails("dropout probability", replace(c, dropout=1.0))
