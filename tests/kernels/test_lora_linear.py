"""LoRA linear layers against the plain expression, forward and backward, with either backend; parity with peft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.counting import counting
from kernels.dispatch import PRIMITIVES, Kernel, as_on_card, recording
from kernels.dropout import keep_mask
from kernels.int8 import quantize_int8
from kernels.launches import Launch
from kernels.lora_linear import Weight, dense, lora_linear, lora_linear_reference, lora_linears
from kernels.nf4 import quantize_nf4
from tests.kernels.tolerance import assert_within_twice

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RANDOM_SHAPES = 200 if torch.cuda.is_available() else 4
STORED: dict[str, Callable[[Tensor], Weight]] = {"dense": lambda w: w, "nf4": quantize_nf4, "int8": quantize_int8}


@dataclass(frozen=True)
class Case:
    x: Tensor
    weights: Sequence[Weight]
    biases: Sequence[Tensor | None]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    dys: Sequence[Tensor]
    seed: Tensor
    dropout: float
    scaling: float = 1.7
    site: int = 4

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, *self.a, *self.b]

    def double(self) -> Case:
        return replace(
            self,
            x=self.x.double(),
            weights=[dense(weight, self.x.dtype).double() for weight in self.weights],
            biases=[None if bias is None else bias.double() for bias in self.biases],
            a=[a.double() for a in self.a],
            b=[b.double() for b in self.b],
            dys=[dy.double() for dy in self.dys],
        )


def case(
    tokens: int,
    k: int,
    outs: Sequence[int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout: float = 0.3,
    stored: str = "dense",
    parameters: torch.dtype | None = None,
) -> Case:
    """parameters: dtype of A and B, that of x if None."""
    generator = torch.Generator().manual_seed(tokens + k + rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return Case(
        x=draw(tokens, k).to(dtype),
        weights=[STORED[stored]((draw(n, k) / k**0.5).to(dtype)) for n in outs],
        biases=[draw(n).to(dtype) if i % 2 == 0 else None for i, n in enumerate(outs)],
        a=[(draw(rank, k) / k**0.5).to(parameters or dtype) for _ in outs],
        b=[(draw(n, rank) / rank**0.5).to(parameters or dtype) for n in outs],
        dys=[draw(tokens, n).to(dtype) for n in outs],
        seed=torch.tensor([1 << 40 | 77], device=device),
        dropout=dropout,
    )


def ours(c: Case, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    n = len(c.weights)
    return lora_linears(
        leaves[0], c.weights, c.biases, leaves[1 : 1 + n], leaves[1 + n :],
        scaling=c.scaling, dropout=c.dropout, seed=c.seed, site=c.site,
    )  # fmt: skip


def eager(c: Case, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The expression in x's dtype, as under autocast; on fp64 tensors: the truth."""
    n, x = len(c.weights), leaves[0]
    ys = []
    for i, (weight, bias) in enumerate(zip(c.weights, c.biases, strict=True)):
        a, b = (leaf.to(x.dtype) for leaf in (leaves[1 + i], leaves[1 + n + i]))
        dropped = x
        if c.dropout:
            dropped = x * keep_mask(c.seed, c.site + i, *x.shape, c.dropout, x.device).to(x.dtype) / (1 - c.dropout)
        ys.append(F.linear(x, dense(weight, x.dtype), bias) + c.scaling * F.linear(F.linear(dropped, a), b))
    return tuple(ys)


def results(function: Callable[[Case, list[Tensor]], tuple[Tensor, ...]], c: Case) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in c.trained]
    ys = function(c, leaves)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, c.dys)]


def assert_accurate(c: Case) -> None:
    n = len(c.weights)
    names = [f"{name}{i}" for name in ("y", "da", "db") for i in range(n)]
    names.insert(n, "dx")
    got, torchs, truth = results(ours, c), results(eager, c), results(eager, c.double())
    for name, mine, allowed, exact, leaf in zip(names, got, torchs, truth, [*c.dys, *c.trained], strict=True):
        assert mine.dtype == leaf.dtype
        assert_within_twice(mine, allowed, exact, name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "outs", "rank"),
    [
        (1, 32, (48,), 4),
        (33, 72, (40, 24, 8), 8),
        (127, 70, (33,), 20),
        (65, 64, (9, 16), 64),
        (17, 50, (32,), 128),
        (19, 33, (40, 24), 1),
        (21, 40, (24, 16), 100),
        (17, 50, (16, 32), 200),
        (17, 34, (24, 16, 16), 256),
    ],
)
def test_error_is_at_most_twice_that_of_torch(
    backend: str, tokens: int, k: int, outs: tuple[int, ...], rank: int, dropout: float, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    assert_accurate(case(tokens, k, outs, rank, dtype, device, dropout=dropout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for i in range(RANDOM_SHAPES):
        tokens, width = (2048, 4096) if torch.cuda.is_available() else (40, 64)
        # of a db with a few values the largest error is chance, and torch's own changes with where its tensors lie
        outs = [16 + below(width) for _ in range(1 + below(3))]
        rank = (1, 4, 8, 16, 64, 100, 128, 200, 256)[below(9)]
        dropout = (0.05, 0.5, 0.0)[i % 3]
        parameters = torch.float32 if below(2) else dtype
        shape = 16 + below(tokens), 1 + below(width), outs, rank
        assert_accurate(case(*shape, dtype, device, dropout=dropout, parameters=parameters))


def test_a_single_channel_out(triton_backend: None, device: torch.device) -> None:
    c = case(33, 50, (1, 3), 8, torch.float32, device)
    for mine, exact in zip(results(ours, c), results(eager, c.double()), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_tokens_and_channels(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    """More of both than one program takes."""
    assert_accurate(case(270, 30, (16,), 4, dtype, device))
    assert_accurate(case(5, 1100, (16,), 4, dtype, device))


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_packed_weights_and_fp32_parameters(backend: str, stored: str, device: torch.device) -> None:
    assert_accurate(case(33, 64, (40, 16), 8, torch.float16, device, stored=stored, parameters=torch.float32))


@pytest.mark.parametrize("p", [0.05, 0.9])
def test_each_layer_has_its_own_mask_and_the_gradient_has_it_too(backend: str, p: float, device: torch.device) -> None:
    c = case(40, 48, (24, 24), 4, torch.float32, device, dropout=p)
    first, second = (keep_mask(c.seed, c.site + i, 40, 48, p, device) for i in (0, 1))
    assert not torch.equal(first, second)
    silent = replace(c, weights=[torch.zeros_like(dense(weight, torch.float32)) for weight in c.weights])
    y0, _, dx, *_ = results(ours, silent)
    assert torch.equal(dx == 0, ~(first | second))
    changed = replace(silent, x=torch.where(first, silent.x, 1e3))  # what is dropped has no say
    torch.testing.assert_close(results(ours, changed)[0], y0)


@pytest.mark.parametrize("rank", [8, 32, 128, 256])
def test_no_product_is_wider_than_the_rank(rank: int) -> None:
    steps = []

    def note(_: Kernel, __: tuple[int, ...], ___: Launch, ____: tuple[object, ...], constants: Any) -> None:
        steps.append((constants["INNER"], constants["PADDED"]))

    with as_on_card(90), recording(note):
        for adapters in (1, 2, 3):
            sizes = (9, 64), (9, adapters * rank), (adapters * rank, 64)
            dx, g, a = (torch.empty(size, dtype=torch.float16, device="meta") for size in sizes)
            seed = torch.empty(1, dtype=torch.int64, device="meta")
            PRIMITIVES["lora_update_"].launcher(dx, g, a, adapters, 0.1, seed, 0)
    assert len(steps) == 3
    assert all(inner <= padded for inner, padded in steps)


def test_a_group_is_cast_in_one_launch_each_way() -> None:
    """What lies beside the products is launched often and does little: 46 of 165 launches of a block of LLaMA's."""
    fp32, half, long = ({"dtype": dtype, "device": "meta"} for dtype in (torch.float32, torch.float16, torch.int64))
    a, b = ([torch.empty(shape, **fp32, requires_grad=True) for _ in range(3)] for shape in ((8, 64), (32, 8)))
    x, weights = torch.empty(16, 64, **half, requires_grad=True), [torch.empty(32, 64, **half)] * 3
    with counting() as counter:
        ys = lora_linears(x, weights, [None] * 3, a, b, scaling=2.0, dropout=0.1, seed=torch.empty(1, **long))
        forward = counter.mark()
        torch.autograd.grad(ys, [x, *a, *b], [torch.empty_like(y) for y in ys])
    for ops in (counter.ops[:forward], counter.ops[forward:]):
        assert [op.name for op in ops if op.kind == "memory"] == ["_foreach_copy_"]


def test_without_a_seed_nothing_is_dropped(backend: str, device: torch.device) -> None:
    c = case(9, 32, (16,), 4, torch.float32, device)
    arguments = c.x, c.weights[0], c.biases[0], c.a[0], c.b[0]
    y = lora_linear(*arguments, scaling=2.0, dropout=0.5)
    torch.testing.assert_close(y, lora_linear(*arguments, scaling=2.0))


def test_a_group_is_its_layers(backend: str, device: torch.device) -> None:
    c = case(33, 64, (40, 16, 16), 8, torch.float32, device)
    alone = [
        lora_linear(
            c.x, c.weights[i], c.biases[i], c.a[i], c.b[i],
            scaling=c.scaling, dropout=c.dropout, seed=c.seed, site=c.site + i,
        )
        for i in range(3)
    ]  # fmt: skip
    for y, expected in zip(ours(c, c.trained), alone, strict=True):
        torch.testing.assert_close(y, expected)


def test_saves_x_and_nothing_else(triton_backend: None, device: torch.device) -> None:
    c = case(33, 64, (40, 16), 8, torch.float16, device, stored="nf4", parameters=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in c.trained]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ours(c, leaves)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in (*leaves, c.seed)}


@pytest.mark.parametrize("which", [[0], [2, 1], [3, 4], [2, 3]], ids=["x", "both A", "both B", "an A and a B"])
def test_only_what_needs_a_gradient_gets_one(backend: str, which: list[int], device: torch.device) -> None:
    c = case(17, 32, (16, 8), 4, torch.float32, device)
    everything = results(ours, c)[2:]
    leaves = [tensor.detach().requires_grad_(i in which) for i, tensor in enumerate(c.trained)]
    gradients = torch.autograd.grad(ours(c, leaves), [leaves[i] for i in which], c.dys)
    for i, gradient in zip(which, gradients, strict=True):
        torch.testing.assert_close(gradient, everything[i])


def test_strided_input_and_gradient(backend: str, device: torch.device) -> None:
    c = case(40, 96, (64,), 8, torch.float32, device)
    apart = replace(c, x=c.x.repeat(1, 2)[:, 96:], dys=[c.dys[0].repeat(1, 2)[:, :64]])
    across = replace(c, x=c.x.T.contiguous().T, dys=[c.dys[0].T.contiguous().T])
    for strided in (apart, across):
        for got, expected in zip(results(ours, strided), results(ours, c), strict=True):
            torch.testing.assert_close(got, expected)


def test_no_tokens(backend: str, device: torch.device) -> None:
    y, dx, da, db = results(ours, case(0, 32, (16,), 4, torch.float32, device))
    assert y.shape == (0, 16)
    assert dx.shape == (0, 32)
    assert not da.any()
    assert not db.any()


def test_gradcheck_of_the_reference() -> None:
    c = case(3, 6, (5,), 2, torch.float64, torch.device("cpu"))

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear_reference(x, c.weights[0], c.biases[0], a, b, c.scaling, c.dropout, c.seed, c.site)

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in c.trained])


def test_parity_with_peft(backend: str, device: torch.device) -> None:
    lora = pytest.importorskip("peft.tuners.lora")
    torch.manual_seed(0)
    base = torch.nn.Linear(48, 40)
    layer = lora.Linear(
        base, adapter_name="default", config=lora.LoraConfig(r=8, lora_alpha=16, init_lora_weights="gaussian"),
        r=8, lora_alpha=16, init_lora_weights="gaussian",
    )  # fmt: skip
    layer = layer.to(device)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x, dy = torch.randn(33, 48, device=device, requires_grad=True), torch.randn(33, 40, device=device)
    y = lora_linear(x, base.weight.detach(), base.bias.detach(), a, b, scaling=layer.scaling["default"])
    expected = layer(x)
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(out, (x, a, b), dy) for out in (y, expected))
    for got, peft in zip(*gradients, strict=True):
        torch.testing.assert_close(got, peft)


def test_what_does_not_fit_is_named() -> None:
    c = case(4, 32, (16,), 4, torch.float16, torch.device("cpu"))
    fitting = dict(x=c.x, weight=c.weights[0], bias=c.biases[0], a=c.a[0], b=c.b[0])
    frozen = torch.nn.Parameter(dense(c.weights[0], torch.float16))
    for change, message in (
        (dict(x=c.x[:, :8]), r"\(4, 8\), \(16, 32\), \(4, 32\), \(16, 4\)"),
        (dict(b=c.b[0][:, :2]), r"\(4, 32\), \(16, 2\)"),
        (dict(bias=torch.zeros(5).half()), r"bias must be \(16,\), got \(5,\)"),
        (dict(weight=frozen.detach().float()), r"must be torch.float16, got \['torch.float32', 'torch.float16'\]"),
        (dict(weight=frozen), "requires a gradient"),
        (dict(a=torch.zeros(257, 32)), "from 1 to 256, got 257"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linear(**(fitting | change), scaling=1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        lora_linear(**fitting, scaling=1.0, dropout=1.0)
    with pytest.raises(ValueError, match=r"1 to 3 layers, got \[1, 2, 1, 1\]"):
        lora_linears(c.x, c.weights, [None, None], c.a, c.b, scaling=1.0)
    with pytest.raises(ValueError, match=r"1 to 3 layers, got \[4, 4, 4, 4\]"):
        lora_linears(c.x, 4 * c.weights, 4 * c.biases, 4 * c.a, 4 * c.b, scaling=1.0)
