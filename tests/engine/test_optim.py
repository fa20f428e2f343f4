from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.distributed import Ranks
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
        set_grads(model, step)
        opt.step(1e-2)


def moment(opt: Optimizer, name: str, which: str = "exp_avg") -> Tensor:
    return opt.state_tensors()[f"optimizer/{which}/{name}"]


def test_matrices_decay_and_vectors_and_biases_do_not():
    """Updates with gradients of zero only decay."""
    model = Toy()
    opt = optimizer(model)
    before = {name: p.detach().clone() for name, p in opt.named.items()}
    opt.step(0.5)
    shrunk = {name for name, p in opt.named.items() if not torch.equal(p, before[name])}
    assert shrunk == {"down.weight", "modality_embedding.weight"}
    for name in shrunk:
        torch.testing.assert_close(opt.named[name].detach(), before[name] * (1 - 0.5 * 0.02))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        optimizer(Toy().requires_grad_(False))


def test_parameters_on_two_devices_are_refused():
    model = Toy()
    model.odd.to("meta")
    with pytest.raises(ValueError, match="are on cpu, meta"):
        optimizer(model)


def test_steps_are_torchs_adamw():
    """Clipping, decay by group and learning rate included."""
    ours, torchs = Toy(), Toy()
    opt = optimizer(ours)
    named = [(name, p) for name, p in torchs.named_parameters() if p.requires_grad]
    groups = [[p for n, p in named if (n in ("down.weight", "modality_embedding.weight")) is d] for d in (True, False)]
    adamw = torch.optim.AdamW(
        [{"params": p, "weight_decay": w} for p, w in zip(groups, (0.02, 0.0), strict=True)], betas=(0.9, 0.95)
    )
    for step in range(20):
        for _, p in named:
            p.grad = torch.zeros_like(p)
        set_grads(ours, step, factor=1024.0)
        set_grads(torchs, step)
        norm = opt.step(1e-2 / (step + 1), scale=1024.0, clip_grad=5.0)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_([p for _, p in named], 5.0))
        for group in adamw.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        adamw.step()
    for name, parameter in torchs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.base.weight, Toy().base.weight)


def test_a_tensor_that_no_sample_touched_is_updated_as_with_a_zero_gradient():
    model = Toy()
    opt = optimizer(model)
    run(model, opt, range(2))
    weight, before = model.down.weight.detach().clone(), moment(opt, "down.weight").clone()
    assert all(p.grad is not None and not p.grad.any() for p in opt.named.values())
    opt.step(1e-2)
    torch.testing.assert_close(moment(opt, "down.weight"), 0.9 * before)
    assert not torch.equal(model.down.weight, weight)
    assert model.base.weight.grad is None


@pytest.mark.parametrize("bad", ["gradient", "guard"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str):
    model = Toy()
    opt = optimizer(model)
    run(model, opt, range(2))
    before = {name: p.detach().clone() for name, p in opt.named.items()} | {
        name: tensor.clone() for name, tensor in opt.state_tensors().items()
    }
    set_grads(model, 5)
    guard = torch.tensor(float("nan") if bad == "guard" else 1.0)
    if bad == "gradient":
        model.norm.bias.grad[2] = float("inf")
    grad = model.norm.bias.grad.clone()
    assert bool(torch.isfinite(opt.step(1e-2, clip_grad=1.0, guard=guard))) == (bad == "guard")
    after = {**opt.named, **opt.state_tensors()}
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert torch.equal(model.norm.bias.grad, grad)
    opt.zero_grad()
    assert not any(p.grad.any() for p in opt.named.values())


def test_a_step_does_not_look_at_a_number():
    """Nothing of it goes to the host, whatever the device is."""

    class NoLook(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **kwargs or {})

    opt = optimizer(Toy())
    with NoLook():
        opt.step(1e-2, scale=8.0, clip_grad=1.0, guard=torch.ones(()))
        with pytest.raises(AssertionError):
            torch.ones(1).item()


def test_gradients_that_are_put_elsewhere_are_found():
    models = Toy(), Toy()
    first, second = (optimizer(model) for model in models)
    for step in range(3):
        set_grads(models[0], step)
        models[0].odd.bias.grad.zero_()
        first.step(1e-2)
        set_grads(models[1], step)
        models[1].down.weight.grad = models[1].down.weight.grad.clone()
        models[1].odd.bias.grad = None
        second.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    models[1].zero_grad()
    second.zero_grad()
    assert all(p.grad is not None for p in second.named.values())


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_backward_leaves_the_gradients_where_the_optimiser_put_them(one_rank: None):
    """Also that of DDP, whose buckets hold copies."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    opt = optimizer(model)
    places = {name: p.grad for name, p in opt.named.items()}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    grads = []
    for world in (1, 2):  # of 2 there is one, which is enough for DDP
        wrapped = Ranks(rank=0, local_rank=0, world=world).wrap(model)
        for _ in range(2):
            opt.zero_grad()
            wrapped(x).square().sum().backward()
            assert all(p.grad is places[name] for name, p in opt.named.items())
            grads.append(torch.cat([p.grad.flatten() for p in opt.named.values()]))
    assert all(torch.equal(grads[0], grad) for grad in grads)
    assert grads[0].any()


def test_16_bit_parameters_have_master_weights():
    """Updates that 16 bits could not hold add up, and one norm clips the gradients of both dtypes."""
    mixed, plain = Toy(), Toy()
    names = ("down.weight", "norm.bias")
    for name in names:
        mixed.get_parameter(name).data = mixed.get_parameter(name).data.bfloat16()
        plain.get_parameter(name).data = mixed.get_parameter(name).data.float()
    first, second = optimizer(mixed), optimizer(plain)
    for step in range(6):
        for opt, model in ((first, mixed), (second, plain)):
            set_grads(model, step)
            for name in names:
                model.get_parameter(name).grad.copy_(model.get_parameter(name).grad.bfloat16())
            norm = opt.step(1e-5, clip_grad=0.5)
            assert norm > 0.5
    for name, parameter in plain.named_parameters():
        if name in names:
            master = moment(first, name, "master")
            torch.testing.assert_close(master, parameter.detach(), rtol=1e-6, atol=1e-9)
            assert torch.equal(mixed.get_parameter(name), master.bfloat16())
        else:
            torch.testing.assert_close(mixed.get_parameter(name), parameter, rtol=1e-6, atol=1e-9)
    assert {key for key in first.state_tensors() if "/master/" in key} == {f"optimizer/master/{n}" for n in names}


def test_state_of_a_run_in_another_precision_is_taken_over():
    wide, narrow = Toy(), Toy().bfloat16()
    first, second = optimizer(wide), optimizer(narrow)
    run(narrow, second, range(2))
    saved = second.state_tensors()
    for name, parameter in second.named.items():
        wide.get_parameter(name).data.copy_(parameter.detach())
    first.load_state_tensors(saved)
    for name, parameter in first.named.items():
        assert torch.equal(parameter, saved[f"optimizer/master/{name}"])
        assert not torch.equal(parameter, narrow.get_parameter(name))
    run(wide, first, range(2, 4))
    for name, parameter in second.named.items():
        parameter.data.copy_(wide.get_parameter(name).detach())
    second.load_state_tensors(first.state_tensors())
    for name, parameter in second.named.items():
        assert torch.equal(moment(second, name, "master"), parameter.float())
        assert torch.equal(moment(second, name), moment(first, name))


def test_every_tensor_begins_where_vector_loads_may():
    for model in (Toy(), Toy().bfloat16()):
        opt = optimizer(model)
        starts = [tensor.storage_offset() for p in opt.named.values() for tensor in (p, p.grad)]
        assert len(set(starts)) == len(opt.named)
        assert all(start * p.element_size() % 16 == 0 for start, p in zip(starts[::2], opt.named.values(), strict=True))


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are made, and of those that it was given, while they are alive."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.most = 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.bytes:
            self.bytes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.bytes.pop, storage._cdata)
            self.most = max(self.most, sum(self.bytes.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out


def test_weights_leave_their_memory_before_there_are_moments():
    """Else a full run would need a fifth more at its start than it ever needs again."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    with Alive(*model.parameters()) as alive:
        opt = optimizer(model)
    size = 8 * 64 * 64 * 4
    assert alive.most < 4.1 * size
    assert all(p.untyped_storage().nbytes() == size for p in opt.named.values())


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


def test_a_checkpoint_without_state_is_refused():
    opt = optimizer(Toy())
    with pytest.raises(CheckpointError, match=r"missing optimizer/exp_avg/down\.bias, .* and 13 more"):
        opt.load_state_tensors({"down.weight": torch.zeros(3, 4)})


def test_the_state_of_torchs_adamw_is_taken_over():
    """Checkpoints hold what it called so, a step for each tensor."""
    model, torchs = Toy(), Toy()
    adamw = torch.optim.AdamW([p for p in torchs.parameters() if p.requires_grad])
    for p in torchs.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    named = {name: p for name, p in torchs.named_parameters() if p.requires_grad}
    saved = {
        f"optimizer/{m}/{n}": adamw.state[p][m] for n, p in named.items() for m in ("step", "exp_avg", "exp_avg_sq")
    }
    opt = optimizer(model)
    opt.load_state_tensors(saved)
    assert all(torch.equal(opt.state_tensors()[key], tensor) for key, tensor in saved.items())


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
    state = opt.state_tensors() | {"optimizer/step/odd.bias": torch.tensor(7.0)}
    with pytest.raises(CheckpointError, match=r"of \[1.0, 7.0\] updates"):
        opt.load_state_tensors(state)
