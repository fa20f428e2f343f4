"""AdamW against torch.optim.AdamW behind clip_grad_norm_, with either backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adamw import adamw, sum_squares
from tests.kernels.tolerance import assert_within_twice

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])  # of the gradient
RANDOM_SHAPES, LARGEST, STEPS = (200, 1 << 22, 20) if torch.cuda.is_available() else (4, 10_000, 5)
OPTIONS: dict[str, Any] = {"decayed": 600, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.02}


@dataclass
class State:
    """The buffers of `adamw`. `step` runs one step of it with a gradient."""

    param: Tensor
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.param = self.param.clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.updates = self.param.new_zeros(1)

    def step(self, grad: Tensor, lr: float = 1e-2, inv_scale: float = 1.0, **changes: Any) -> Tensor:
        """Returns the gradient buffer as the step leaves it."""
        grad, scalars = grad.clone(), (self.param.new_full((1,), lr), self.param.new_full((1,), inv_scale))
        options = self.options | changes
        self.norm = adamw(self.param, grad, self.exp_avg, self.exp_avg_sq, self.updates, *scalars, **options)
        return grad

    def tensors(self) -> list[Tensor]:
        return [self.param, self.exp_avg, self.exp_avg_sq, self.updates]


def by_torch(param: Tensor, grads: list[Tensor], lrs: list[float], options: dict[str, Any]) -> list[Tensor]:
    """param, exp_avg, exp_avg_sq and the last norm after torch's AdamW in the dtype of `param`."""
    decayed = options["decayed"]
    parts = [part.clone().requires_grad_() for part in (param[:decayed], param[decayed:])]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(parts, (options["weight_decay"], 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(options["beta1"], options["beta2"]), eps=options["eps"])
    for grad, lr in zip(grads, lrs, strict=True):
        for part, slice_ in zip(parts, (grad[:decayed], grad[decayed:]), strict=True):
            part.grad = slice_.to(part.dtype)
        norm = torch.nn.utils.clip_grad_norm_(parts, options.get("max_norm") or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    moments = [torch.cat([optimizer.state[p][name] for p in parts]) for name in ("exp_avg", "exp_avg_sq")]
    return [torch.cat([p.detach() for p in parts]), *moments, norm]


def draw(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_is_torchs(param: Tensor, grads: list[Tensor], lrs: list[float], options: dict[str, Any], what: str) -> None:
    """By the rule of two, after all these steps."""
    ours = State(param, options)
    for grad, lr in zip(grads, lrs, strict=True):
        left = ours.step(grad, lr)
        assert not left.any(), what
    assert ours.updates.item() == len(grads)
    results = [*ours.tensors()[:3], ours.norm]
    torchs, truth = (by_torch(p, grads, lrs, options) for p in (param, param.double()))
    for name, a, b, c in zip(("param", "exp_avg", "exp_avg_sq", "norm"), results, torchs, truth, strict=True):
        assert_within_twice(a, b, c, f"{what}: {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 127, 1024, 9001], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_error_is_at_most_twice_that_of_torch(
    backend: str, size: int, dtype: torch.dtype, max_norm: float | None, device: torch.device
) -> None:
    grads = [(draw(size, seed=step, device=device) * 10.0 ** (step - 3)).to(dtype) for step in range(STEPS)]
    options = OPTIONS | {"decayed": size // 3, "max_norm": max_norm}
    lrs = [1e-2 / (1 + step) for step in range(STEPS)]
    assert_is_torchs(draw(size, seed=99, device=device), grads, lrs, options, f"{size} elements")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(triton_backend: None, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for case in range(RANDOM_SHAPES):
        size = 1 + below(LARGEST >> below(12))
        options = {
            "decayed": below(size + 1), "beta1": (0.0, 0.9, 0.99)[below(3)], "beta2": (0.95, 0.999)[below(2)],
            "eps": (1e-8, 1e-5)[below(2)], "weight_decay": (0.0, 0.1)[below(2)], "max_norm": (None, 1.0)[below(2)],
        }  # fmt: skip
        grads = [draw(size, seed=10 * case + step, device=device).to(dtype) for step in range(3)]
        param = draw(size, seed=10 * case + 9, device=device)
        assert_is_torchs(param, grads, [1e-2] * 3, options, f"{size}, {options}")


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.95, 0.999, 0.9999])
def test_bias_corrections_hold_from_the_first_update_to_the_millionth(
    backend: str, beta: float, device: torch.device
) -> None:
    """1 - beta^step in fp32 would cancel. The betas differ, so that an error does not cancel in the quotient."""
    for updates in (1, 2, 3, 5, 10, 100, 1_000, 1_000_000):
        c = -math.expm1(updates * math.log(beta)) if beta else 1.0
        for first, second in ((beta, 0.0), (0.0, beta)):
            state = State(torch.zeros(1, device=device), OPTIONS | {"decayed": 0, "beta1": first, "beta2": second})
            state.exp_avg += 1.0
            state.exp_avg_sq += 1.0
            state.updates += updates - 1
            state.step(torch.ones(1, device=device), lr=1.0)  # of 1: both moments stay what they are
            assert state.updates.item() == updates
            assert -state.param.double().item() == pytest.approx(1 / c if first else math.sqrt(c), rel=1e-6)


def test_the_gradient_is_unscaled_before_anything_else(backend: str, device: torch.device) -> None:
    grad, param = draw(5000, seed=1, device=device), draw(5000, seed=2, device=device)
    plain, scaled = State(param), State(param)
    plain.step(grad, max_norm=1.0)
    scaled.step(grad * 65536.0, inv_scale=1 / 65536.0, max_norm=1.0)
    assert torch.equal(scaled.norm, plain.norm)
    torch.testing.assert_close(plain.norm, grad.norm())
    assert all(torch.equal(a, b) for a, b in zip(scaled.tensors(), plain.tensors(), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["gradient", "guard"])
def test_a_step_that_is_not_finite_changes_nothing(backend: str, bad: float, where: str, device: torch.device) -> None:
    state, grad = State(draw(3000, seed=1, device=device)), draw(3000, seed=2, device=device)
    copy = state.param.half()
    loss = torch.tensor(0.7, device=device)
    state.step(grad, guard=loss, copy=copy)
    before = [tensor.clone() for tensor in (*state.tensors(), copy)]
    if where == "guard":
        loss = loss * bad
    else:
        grad[1234] = bad
    left = state.step(grad, guard=loss, copy=copy, max_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip((*state.tensors(), copy), before, strict=True))
    torch.testing.assert_close(left, grad, rtol=0, atol=0, equal_nan=True)
    assert bool(torch.isfinite(state.norm)) == (where == "guard")
    assert torch.equal(state.step(grad.nan_to_num(0, 0, 0)), torch.zeros_like(grad))  # it goes on


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_weights_are_the_master_weights_rounded(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter truncates fp32 to bf16")
    state, copy = State(draw(3000, seed=1, device=device)), torch.zeros(3000, dtype=dtype, device=device)
    left = state.step(draw(3000, seed=2, device=device).to(dtype), copy=copy)
    assert torch.equal(copy, state.param.to(dtype))
    assert left.dtype == dtype


def test_two_buffers_share_a_norm(backend: str, device: torch.device) -> None:
    param, grad = draw(9000, seed=1, device=device), draw(9000, seed=2, device=device)
    whole, parts = State(param), [State(param[:5000]), State(param[5000:], OPTIONS | {"decayed": 0})]
    whole.step(grad, max_norm=1.0)
    grads, one = (grad[:5000], grad[5000:]), torch.ones(1, device=device)
    squares = torch.cat([sum_squares(part, one) for part in grads])
    for state, part in zip(parts, grads, strict=True):
        state.step(part, max_norm=1.0, squares=squares)
        torch.testing.assert_close(state.norm, whole.norm, rtol=1e-6, atol=0)
    for i in range(3):
        together = torch.cat([state.tensors()[i] for state in parts])
        torch.testing.assert_close(together, whole.tensors()[i], rtol=1e-6, atol=1e-9)


def test_the_norm_of_a_very_large_buffer(backend: str, device: torch.device) -> None:
    """More partial sums than are read at once: those of 37 million elements."""
    state, squares = State(torch.zeros(1000, device=device)), draw(9001, seed=1, device=device).square()
    state.step(torch.zeros(1000, device=device), squares=squares)
    torch.testing.assert_close(state.norm, squares.sum().sqrt())


def test_nothing_to_update(backend: str, device: torch.device) -> None:
    state = State(torch.zeros(0, device=device), OPTIONS | {"decayed": 0})
    state.step(torch.zeros(0, device=device))
    assert state.norm.item() == 0.0
    assert state.updates.item() == 1.0


def test_wrong_input_is_named(device: torch.device) -> None:
    state, grad = State(torch.zeros(700, device=device)), torch.zeros(700, device=device)
    with pytest.raises(ValueError, match=r"got grad \(699,\)"):
        state.step(grad[1:])
    with pytest.raises(ValueError, match=r"got copy \(700,\), strides \(2,\)"):
        state.step(grad, copy=torch.zeros(1400, device=device)[::2])
    with pytest.raises(ValueError, match="decayed from 0 to 700, got 701"):
        state.step(grad, decayed=701)
    with pytest.raises(ValueError, match=r"got 0\.9 and 1\.0"):
        state.step(grad, beta2=1.0)
    state.updates = state.updates[0]
    with pytest.raises(ValueError, match=r"step \[1\], got \(\)"):
        state.step(grad)
    with pytest.raises(ValueError, match=r"in fp32, got torch\.float16"):
        State(torch.zeros(700, device=device).half()).step(grad)
