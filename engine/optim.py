"""AdamW over the trainable tensors, laid end to end: LaVIN's two groups, one fused step that the host never waits for,
state by name for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from kernels.adamw import adamw, sum_squares

PREFIX = "optimizer/"
ALIGN = 32  # elements; a tensor begins where vector loads may, in 16 bits too


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to 1-D tensors (norms, biases) and not to anything called bias."""
    return parameter.ndim > 1 and not name.endswith(".bias")


class Optimizer:
    """AdamW (kernels/adamw.py) over the parameters that require a gradient.

    Parameters and gradients become views of flat buffers, one set of buffers for each dtype, and must stay that:
    weights are loaded into them, and the model keeps its device. 16-bit parameters have fp32 master weights.

    Gradients are zero tensors rather than None, always. AdamW skips a None: without this, a step whose samples have no
    image would leave the vision adapters and their moments as they were on one rank, and decay them on several, where
    DDP hands out zeros. With it a step is the same function of its samples on any number of ranks.

    Args:
        named_parameters: (name, parameter) pairs as from `model.named_parameters()`; frozen ones are left out.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float,
        beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.named = {name: p for name, p in named_parameters if p.requires_grad}
        if not self.named:
            raise ValueError("no parameter requires a gradient: there is nothing to optimise")
        if len(devices := {p.device for p in self.named.values()}) > 1:
            raise ValueError(f"the trained parameters are on {', '.join(sorted(map(str, devices)))}: one is accepted")
        by_dtype: dict[torch.dtype, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named.items():
            by_dtype.setdefault(parameter.dtype, {})[name] = parameter
        self.flats = [_Flat(named) for named in by_dtype.values()]
        self.options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        self.lr, self.inv_scale = (torch.zeros(1, device=device) for device in 2 * [devices.pop()])

    def zero_grad(self) -> None:
        """Every gradient becomes zeros. A step leaves zeros behind it: this is for gradients that came to nothing."""
        for flat in self.flats:
            flat.zero_grad()

    def step(
        self, lr: float, *, scale: float = 1.0, clip_grad: float | None = None, guard: Tensor | None = None
    ) -> Tensor:
        """Divide the gradients by the loss scale, shorten them to global norm `clip_grad` if they are longer, update
        every parameter at this learning rate, and zero the gradients. The host does not wait.

        Where the norm or `guard` (fp32 [] on the parameters' device: the loss) is not finite, nothing changes, and the
        gradients stay to be looked at.

        Returns the norm before clipping, fp32 [] on the parameters' device.
        """
        self.lr.fill_(lr)
        self.inv_scale.fill_(1.0 / scale)
        for flat in self.flats:
            flat.collect_grad()
        squares = None  # of the only gradient
        if len(self.flats) > 1:
            squares = torch.cat([sum_squares(flat.grad, self.inv_scale) for flat in self.flats])
        for flat in self.flats:
            norm = adamw(
                flat.param, flat.grad, flat.exp_avg, flat.exp_avg_sq, flat.step, self.lr, self.inv_scale,
                decayed=flat.decayed, max_norm=clip_grad, guard=guard, copy=flat.copy, squares=squares, **self.options,
            )  # fmt: skip
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Views of the state, `optimizer/{step,exp_avg,exp_avg_sq}/NAME`, and `optimizer/master/NAME` for 16 bits."""
        return {
            f"{PREFIX}{what}/{name}": tensor
            for flat in self.flats
            for name in flat.at
            for what, tensor in flat.state(name).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what state_tensors() gave; keys without the prefix `optimizer/` are other people's.

        The weights are put back before: a run in another precision may have had master weights where this one has none,
        or none where this one starts from the weights themselves.

        Raises:
            CheckpointError: the names or shapes are not those of this model's trainable parameters, or the tensors
                were updated a different number of times.
        """
        saved = {key: value for key, value in tensors.items() if key.startswith(PREFIX)}
        state = self.state_tensors()
        for flat in self.flats:
            for name in flat.at:
                key = f"{PREFIX}master/{name}"
                if key in saved:
                    state[key] = flat.master(name)
                elif key in state:
                    saved[key] = self.named[name].detach()
        if saved.keys() != state.keys():
            raise CheckpointError(
                "the optimiser state in the checkpoint is not this model's: "
                f"missing {_some(state.keys() - saved.keys())}; unexpected {_some(saved.keys() - state.keys())}",
                why="it was written by a run that trained other tensors",
                do="resume with that run's config.yaml, or start a new run with --adapter.init",
            )
        for key, tensor in state.items():
            if saved[key].shape != tensor.shape:
                moment, _, name = key.removeprefix(PREFIX).partition("/")
                got, want = tuple(saved[key].shape), tuple(tensor.shape)
                raise CheckpointError(f"optimiser state {moment} of {name} has shape {got}, the parameter {want}")
        steps = {float(value) for key, value in saved.items() if key.startswith(f"{PREFIX}step/")}
        if len(steps) > 1:
            raise CheckpointError(f"the optimiser state is of {sorted(steps)} updates: one number is accepted")
        for key, tensor in state.items():
            tensor.copy_(saved[key])


class _Flat:
    """Parameters of one dtype, end to end, those with weight decay first; what lies between them stays zero.

    param (the master weights), exp_avg, exp_avg_sq: fp32 [N]. grad, copy: [N] in the parameters' dtype. An fp32
    parameter is a view of `param` and there is no copy, a 16-bit one is a view of `copy`. step: fp32 [1].
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        order = sorted(named, key=lambda name: not decays(name, named[name]))
        ends = list(accumulate(-(-named[name].numel() // ALIGN) * ALIGN for name in order))
        self.at = {name: (start, named[name].shape) for name, start in zip(order, [0, *ends[:-1]], strict=True)}
        self.decayed = max((end for name, end in zip(order, ends, strict=True) if decays(name, named[name])), default=0)
        first = named[order[0]]
        master = torch.promote_types(first.dtype, torch.float32)
        self.param = torch.zeros(ends[-1], dtype=master, device=first.device)
        self.copy = None if master == first.dtype else torch.zeros_like(self.param, dtype=first.dtype)
        for name, parameter in named.items():  # each leaves its own memory, before there are gradients and moments
            weights = self.master(name).copy_(parameter.detach())
            parameter.data = weights if self.copy is None else self._view(self.copy, name).copy_(weights)
        self.grad = torch.zeros_like(self.param, dtype=first.dtype)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.step = self.param.new_zeros(1)
        self.views = [(parameter, self._view(self.grad, name)) for name, parameter in named.items()]
        self.zero_grad()

    def master(self, name: str) -> Tensor:
        """The weights that are updated."""
        return self._view(self.param, name)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        start, shape = self.at[name]
        return flat[start : start + shape.numel()].view(shape)

    def zero_grad(self) -> None:
        self.grad.zero_()
        for parameter, view in self.views:
            parameter.grad = view

    def collect_grad(self) -> None:
        """Brings gradients back that somebody has put elsewhere (zero_grad(set_to_none=True), an assignment)."""
        for parameter, view in self.views:
            found = parameter.grad
            if found is view:
                continue
            if found is None:
                view.zero_()
            else:
                view.copy_(found)
            parameter.grad = view

    def state(self, name: str) -> dict[str, Tensor]:
        """Views of what a checkpoint holds of this parameter."""
        flats = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.copy is not None:
            flats["master"] = self.param
        return {"step": self.step.view(())} | {what: self._view(flat, name) for what, flat in flats.items()}


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
