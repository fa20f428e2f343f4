"""One optimiser step: k packs forward and backward, one update, one wait for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.distributed import Ranks
from engine.errors import NotFinite
from engine.optim import Optimizer
from engine.scaler import LossScaler
from models.pack import Pack


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the log shows of a step; the same on every rank."""

    loss: float  # the step's loss, summed over packs and ranks (their weights sum to one)
    grad_norm: float  # before clipping
    counts: tuple[float, ...]  # the sums over ranks


def dropout_seed(seed: int, step: int, pack: int) -> int:
    """A 31-bit number for the dropout of one pack of a step: splitmix64 over what identifies it, so that a resumed run
    draws what the uninterrupted one would have, and any number of ranks the same for the same packs."""
    mask = (1 << 64) - 1
    state = 0
    for part in (seed, step, pack):
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 33


def train_step(
    model: nn.Module, packs: Sequence[Pack], optimizer: Optimizer, scaler: LossScaler, ranks: Ranks, *,
    step: int, seed: int, lr: float, clip_grad: float | None, device: torch.device, counts: Sequence[float] = (),
) -> StepResult:  # fmt: skip
    """Runs the packs of this rank and updates the weights once.

    The update is launched before anybody knows whether loss and gradient are finite; where they are not, it changes
    nothing. An fp16 overflow repeats the same packs with a smaller loss scale, so no sample is lost.

    Args:
        counts: numbers of this rank that are summed over ranks on the way, exact up to 2^24.
    Raises:
        NotFinite: loss or gradient is not finite (with fp16: even at scale 1). No weight was touched.
    """
    while True:
        totals = _accumulate(model, packs, scaler.scale, ranks, counts, step=step, seed=seed, device=device)
        norm = optimizer.step(lr, scale=scaler.scale, clip_grad=clip_grad, guard=totals[0])
        grad_norm, loss, *sums = torch.cat((norm.view(1), totals)).tolist()  # the step's one wait for the device
        if math.isfinite(loss) and math.isfinite(grad_norm):
            break
        if not scaler.backoff():
            raise NotFinite(
                f"step {step}: loss {loss}, gradient norm {grad_norm}",
                where=_first_bad(optimizer) or "the loss itself",
                why="no weight was changed by this step",
                do="lower --optim.lr, set --optim.clip_grad 1.0, or look at the rows of this step with --debug",
            )
        optimizer.zero_grad()
    scaler.good_step()
    return StepResult(loss=loss, grad_norm=grad_norm, counts=tuple(sums))


def _accumulate(
    model: nn.Module, packs: Sequence[Pack], scale: float, ranks: Ranks, counts: Sequence[float], *,
    step: int, seed: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """Adds the gradients of the packs up; returns loss and counts, summed over ranks, fp32 [1 + counts]."""
    totals = torch.tensor([0.0, *counts]).to(device, non_blocking=True)
    for index, pack in enumerate(packs):
        number = dropout_seed(seed, step, index * ranks.world + ranks.rank)  # its place in the loader's plan
        pack_seed = torch.full((1,), number, dtype=torch.int64, device=device)
        is_last = index == len(packs) - 1
        with nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            loss: Tensor = model(pack.to(device), pack_seed)
            (loss * (scale * ranks.world)).backward()  # DDP takes the mean over ranks; the step wants the sum
        totals[0] += loss.detach()
    return ranks.sum(totals)


def _first_bad(optimizer: Optimizer) -> str:
    for name, parameter in optimizer.named.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"first tensor with a bad gradient: {name}"
    return ""
