"""One optimiser step: when it changes the weights, how often it runs its packs, and what it asks the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed import Ranks
from engine.errors import NotFinite
from engine.optim import Optimizer
from engine.scaler import LossScaler
from engine.step import StepResult, dropout_seed, train_step

CPU = torch.device("cpu")


class Line(nn.Module):
    """The loss of a pack (a tensor here) is a mean of squares; the gradient of `weight` is infinite from `limit` on."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(1, 3))
        self.weight.register_hook(lambda grad: torch.where(grad.abs() < limit, grad, math.inf))
        self.seeds: list[int] = []

    def forward(self, pack: Tensor, seed: Tensor) -> Tensor:
        self.seeds.append(int(seed.detach().numpy()[0]))
        return (pack @ self.weight.T + self.bias).square().mean() / 2


def packs(*factors: float) -> list[Any]:
    return [factor * torch.arange(6.0).view(2, 3) for factor in factors]


def step(model: Line, optimizer: Optimizer, scaler: LossScaler, these: list[Any], **options: Any) -> StepResult:
    given = {"step": 7, "seed": 3, "lr": 0.1, "clip_grad": None, "device": CPU} | options
    return train_step(model, these, optimizer, scaler, Ranks(rank=0, local_rank=0, world=1), **given)


def made(limit: float = math.inf, fp16: bool = False) -> tuple[Line, Optimizer, LossScaler]:
    model = Line(limit)
    return model, Optimizer(model.named_parameters(), weight_decay=0.0), LossScaler(enabled=fp16)


def test_gradients_of_the_packs_add_up() -> None:
    model, optimizer, scaler = made()
    apart = Line()
    loss = sum(apart(pack, torch.zeros(1)) for pack in packs(1, 2))
    loss.backward()
    result = step(model, optimizer, scaler, packs(1, 2), counts=(5, 8))
    assert result.loss == pytest.approx(loss.item())
    assert result.grad_norm == pytest.approx(float(torch.cat([apart.weight.grad[0], apart.bias.grad]).norm()))
    assert result.counts == (5, 8)
    assert model.seeds == [dropout_seed(3, 7, 0), dropout_seed(3, 7, 1)]
    assert not torch.equal(model.weight, apart.weight)
    assert not model.weight.grad.any()


def test_an_overflow_repeats_the_packs_and_leaves_no_trace() -> None:
    model, optimizer, scaler = made(limit=1e5, fp16=True)
    plain, plain_optimizer, disabled = made()
    for number in range(3):
        result = step(model, optimizer, scaler, packs(1), step=number)
        expected = step(plain, plain_optimizer, disabled, packs(1), step=number)
        assert result == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    repeats = len(model.seeds) - 3
    assert repeats > 1 and scaler.scale == 65536 / 2**repeats
    assert set(model.seeds[: repeats + 1]) == {dropout_seed(3, 0, 0)}


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_not_finite_names_the_tensor_and_changes_no_weight(where: str) -> None:
    model, optimizer, scaler = made(limit=0.1 if where == "gradient" else math.inf, fp16=True)
    before = [p.detach().clone() for p in model.parameters()]
    these = packs(1, math.nan if where == "loss" else 1)
    with pytest.raises(NotFinite, match="step 7: loss") as caught:
        step(model, optimizer, scaler, these)
    assert caught.value.where == f"first tensor with a bad gradient: {'weight' if where == 'gradient' else 'bias'}"
    assert scaler.scale == 1.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not any(tensor.any() for tensor in optimizer.state_tensors().values())


def test_a_loss_that_is_not_finite_by_itself_changes_no_weight() -> None:
    class Above(Line):
        def forward(self, pack: Tensor, seed: Tensor) -> Tensor:
            return super().forward(pack, seed) + math.inf

    model = Above()
    optimizer = Optimizer(model.named_parameters(), weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotFinite) as caught:
        step(model, optimizer, LossScaler(enabled=False), packs(1))
    assert caught.value.where == "the loss itself"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(str(func))
            return func(*args, **kwargs or {})

    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: waits.append("tolist") or tolist(self))
    model, optimizer, scaler = made(fp16=True)
    with Watch():
        step(model, optimizer, scaler, packs(1, 2), clip_grad=1.0, counts=(1, 2))
    assert waits == ["tolist"]
