from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.errors import CheckpointError
from engine.optim import Optimizer


class Toy(nn.Module):
    """The kinds of tensors that train: matrices, biases, norms, a bias that is a matrix, and one without gradient."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)
        self.modality_embedding = nn.Embedding(2, 4)
        self.odd = nn.Module()
        self.odd.bias = nn.Parameter(torch.randn(2, 3, generator=generator))
        self.base = nn.Linear(4, 4).requires_grad_(False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)


def optimizer(model: nn.Module, **changes) -> Optimizer:
    return Optimizer(model.named_parameters(), **{"weight_decay": 0.02, **changes})


def set_grads(model: nn.Module, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad.copy_(factor * torch.randn(parameter.shape, generator=generator))


def run(model: nn.Module, opt: Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        set_grads(model, step)
        opt.unscale_and_clip(1.0, None)
        opt.step(1e-2)


def test_matrices_decay_and_vectors_and_biases_do_not():
    model = Toy()
    groups = optimizer(model).adamw.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decayed == {"down.weight", "modality_embedding.weight"}
    assert plain == {"down.bias", "norm.weight", "norm.bias", "odd.bias"}
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in groups)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        optimizer(Toy().requires_grad_(False))


def test_one_step_is_adamw():
    model = Toy()
    opt = optimizer(model)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    run(model, opt, range(1))
    for name, parameter in opt.named.items():
        grad = parameter.grad.double()
        decay = 0.02 if name in ("down.weight", "modality_embedding.weight") else 0.0
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.base.weight.double(), before["base.weight"])


def test_a_tensor_that_no_sample_touched_is_updated_as_with_a_zero_gradient():
    model = Toy()
    opt = optimizer(model)
    run(model, opt, range(2))
    weight, moment = model.down.weight.detach().clone(), opt.adamw.state[model.down.weight]["exp_avg"].clone()
    opt.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in opt.named.values())
    opt.unscale_and_clip(1.0, None)
    opt.step(1e-2)
    torch.testing.assert_close(opt.adamw.state[model.down.weight]["exp_avg"], 0.9 * moment)
    assert not torch.equal(model.down.weight, weight)
    assert model.base.weight.grad is None


def test_gradients_are_unscaled_then_clipped_and_the_norm_is_the_one_before():
    model = Toy()
    opt = optimizer(model)
    opt.zero_grad()
    set_grads(model, 1)
    expected = torch.cat([p.grad.flatten() for p in opt.named.values()])
    for scale, clip, length in (
        (1.0, None, expected.norm()),
        (1024.0, 0.5, torch.tensor(0.5)),
        (8.0, 1e6, expected.norm()),
    ):
        set_grads(model, 1, factor=scale)
        norm = opt.unscale_and_clip(scale, clip)
        got = torch.cat([p.grad.flatten() for p in opt.named.values()])
        assert norm.shape == ()
        torch.testing.assert_close(norm, expected.norm())
        torch.testing.assert_close(got, expected * (length / expected.norm()), rtol=1e-5, atol=1e-6)


def test_a_bad_gradient_shows_in_the_norm():
    model = Toy()
    opt = optimizer(model)
    opt.zero_grad()
    model.norm.bias.grad[2] = float("inf")
    assert not torch.isfinite(opt.unscale_and_clip(1.0, 1.0))


def test_state_through_a_checkpoint_continues_bit_for_bit(tmp_path):
    through, straight = Toy(), Toy()
    first = optimizer(through)
    run(through, first, range(3))
    weights = {name: p.detach() for name, p in through.named_parameters()}
    path = save_checkpoint(tmp_path, 3, weights | first.state_tensors(), {})
    loaded, _ = load_checkpoint(path)
    resumed = Toy()
    resumed.load_state_dict({name: t for name, t in loaded.items() if "/" not in name})
    second = optimizer(resumed)
    second.load_state_tensors(loaded)
    run(resumed, second, range(3, 6))
    third = optimizer(straight)
    run(straight, third, range(6))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))
    ours, theirs = second.state_tensors(), third.state_tensors()
    assert ours.keys() == theirs.keys()
    assert "optimizer/exp_avg_sq/down.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_before_the_first_step_there_is_no_state(tmp_path):
    opt = optimizer(Toy())
    assert opt.state_tensors() == {}
    opt.load_state_tensors({"down.weight": torch.zeros(3, 4)})
    assert opt.state_tensors() == {}


def test_loaded_state_does_not_share_memory():
    model = Toy()
    opt = optimizer(model)
    run(model, opt, range(1))
    saved = {name: tensor.clone() for name, tensor in opt.state_tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    opt.load_state_tensors(saved)
    run(model, opt, range(1))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_state_of_another_model_is_refused_with_its_names():
    model = Toy()
    opt = optimizer(model)
    run(model, opt, range(1))
    state = opt.state_tensors()
    del state["optimizer/exp_avg/odd.bias"]
    with pytest.raises(CheckpointError, match=r"missing optimizer/exp_avg/odd.bias; unexpected nothing"):
        opt.load_state_tensors(state)
    state = opt.state_tensors() | {"optimizer/step/other": torch.zeros(())}
    with pytest.raises(CheckpointError, match="unexpected optimizer/step/other"):
        opt.load_state_tensors(state)
    state = opt.state_tensors() | {"optimizer/exp_avg/odd.bias": torch.zeros(3, 2)}
    with pytest.raises(CheckpointError, match=r"exp_avg of odd.bias has shape \(3, 2\), the parameter \(2, 3\)"):
        opt.load_state_tensors(state)
