"""AdamW over the trainable tensors: LaVIN's two groups, clipping without a host sync, state by name for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from engine.errors import CheckpointError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
PREFIX = "optimizer/"


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to 1-D tensors (norms, biases) and not to anything called bias."""
    return parameter.ndim > 1 and not name.endswith(".bias")


class Optimizer:
    """torch's AdamW (fused on CUDA) over the parameters that require a gradient.

    Gradients are zero tensors rather than None from the first step on. AdamW skips a None: without this, a step whose
    samples have no image would leave the vision adapters and their moments as they were on one rank, and decay them on
    several, where DDP hands out zeros. With it a step is the same function of its samples on any number of ranks.

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
        groups = [
            {"params": [p for n, p in self.named.items() if decays(n, p)], "weight_decay": weight_decay},
            {"params": [p for n, p in self.named.items() if not decays(n, p)], "weight_decay": 0.0},
        ]
        on_cuda = all(p.is_cuda for p in self.named.values())
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=(beta1, beta2), eps=eps, fused=on_cuda
        )

    def zero_grad(self) -> None:
        """Every gradient becomes a tensor of zeros."""
        grads = []
        for parameter in self.named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                grads.append(parameter.grad)
        if grads:
            torch._foreach_zero_(grads)

    def unscale_and_clip(self, scale: float, clip_grad: float | None) -> Tensor:
        """Divide the gradients by the loss scale, then shorten them to global norm `clip_grad` if they are longer.

        Returns the norm before clipping, fp32 [] on the parameters' device: the host does not wait for it.
        """
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / scale)
        norm = get_total_norm(grads)
        if clip_grad is not None:
            clip_grads_with_norm_(self.named.values(), clip_grad, norm)
        return norm

    def step(self, lr: float) -> None:
        """One update of every parameter at this learning rate."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments as `optimizer/{step,exp_avg,exp_avg_sq}/NAME`; empty before the first step."""
        state = self.adamw.state
        return {f"{PREFIX}{m}/{n}": state[p][m] for n, p in self.named.items() if p in state for m in MOMENTS}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what state_tensors() gave; keys without the prefix `optimizer/` are other people's.

        Raises:
            CheckpointError: the names or shapes are not those of this model's trainable parameters.
        """
        saved = {key: value for key, value in tensors.items() if key.startswith(PREFIX)}
        expected = {f"{PREFIX}{m}/{n}" for n in self.named for m in MOMENTS} if saved else set()
        if saved.keys() != expected:
            raise CheckpointError(
                "the optimiser state in the checkpoint is not this model's: "
                f"missing {_some(expected - saved.keys())}; unexpected {_some(saved.keys() - expected)}",
                why="it was written by a run that trained other tensors",
                do="resume with that run's config.yaml, or start a new run with --adapter.init",
            )
        state: dict[Tensor, dict[str, Any]] = {}
        for name, parameter in self.named.items() if saved else ():
            moments = {m: saved[f"{PREFIX}{m}/{name}"] for m in MOMENTS}
            for moment in MOMENTS[1:]:
                if moments[moment].shape != parameter.shape:
                    got, want = tuple(moments[moment].shape), tuple(parameter.shape)
                    raise CheckpointError(f"optimiser state {moment} of {name} has shape {got}, the parameter {want}")
            fused = bool(self.adamw.defaults["fused"])
            state[parameter] = {
                "step": moments["step"].to(parameter.device if fused else "cpu", copy=True),
                **{m: moments[m].to(parameter.device, copy=True) for m in MOMENTS[1:]},
            }
        self.adamw.state.clear()
        self.adamw.state.update(state)


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
