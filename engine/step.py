"""One optimiser step: k packs forward and backward, one update, one wait for the device (a pass that is no CUDA graph
yet may add one)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.distributed import Ranks
from engine.errors import NotFinite, is_of_a_gpu
from engine.graphs import Passes
from engine.memory_size import gib
from engine.optim import Optimizer
from engine.scaler import LossScaler
from kernels import unpacked
from models.pack import Pack

logger = logging.getLogger("nibble")


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
    passes: Passes | None = None,
) -> StepResult:  # fmt: skip
    """Runs the packs of this rank and updates the weights once.

    The update is launched before anybody knows whether loss and gradient are finite; where they are not, it changes
    nothing. An fp16 overflow repeats the same packs with a smaller loss scale, so no sample is lost. Where a pass
    finds no memory, and there is one rank, the packs are repeated after giving back what CUDA graphs keep, and then the
    unpacked copies of weights: neither changes a result.

    Args:
        counts: numbers of this rank that are summed over ranks on the way, exact up to 2^24.
        passes: how a pack's forward and backward pass are launched; None: op by op.
    Raises:
        NotFinite: loss or gradient is not finite (with fp16: even at scale 1). No weight was touched.
    """
    passes = Passes(device) if passes is None else passes
    with passes.stream():
        return _step(
            model, packs, optimizer, scaler, ranks, passes,
            step=step, seed=seed, lr=lr, clip_grad=clip_grad, counts=counts,
        )  # fmt: skip


def _step(
    model: nn.Module, packs: Sequence[Pack], optimizer: Optimizer, scaler: LossScaler, ranks: Ranks, passes: Passes, *,
    step: int, seed: int, lr: float, clip_grad: float | None, counts: Sequence[float],
) -> StepResult:  # fmt: skip
    # on several ranks the others would not repeat their part of the exchange
    may_go = _memory_that_may_go(passes) if ranks.world == 1 else []
    while True:
        totals = None
        try:
            totals = _accumulate(model, packs, scaler.scale, ranks, counts, passes, step=step, seed=seed)
        except RuntimeError as error:
            if not may_go or not is_of_a_gpu(error):
                raise
        if totals is None:  # the error is gone, and with it what it kept of the pass
            what, give_back = may_go.pop(0)
            logger.warning("step %d: no memory; it is repeated without %s", step, what)
            give_back()
            optimizer.zero_grad()
            continue
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


def _memory_that_may_go(passes: Passes) -> list[tuple[str, Callable[[], None]]]:
    """What a step can do without, and how it is given back."""

    def give_up_copies() -> None:
        passes.release()  # graphs read them
        unpacked.give_up_copies()

    found: list[tuple[str, Callable[[], None]]] = []
    if passes.keeps_memory:
        found.append(("what CUDA graphs keep", passes.release))
    if kept := unpacked.kept_bytes():
        found.append((f"{gib(kept)} of unpacked copies of weights", give_up_copies))
    return found


def _accumulate(
    model: nn.Module, packs: Sequence[Pack], scale: float, ranks: Ranks, counts: Sequence[float], passes: Passes, *,
    step: int, seed: int,
) -> Tensor:  # fmt: skip
    """Adds the gradients of the packs up; returns loss and counts, summed over ranks, fp32 [1 + counts].

    Numbers go to the device as arguments of kernels that fill tensors: a copy from the host would wait for it.
    """
    scalars = passes.scalars
    scalars.loss.zero_()
    scalars.scale.fill_(scale * ranks.world)  # DDP takes the mean over ranks; the step wants the sum
    for index, pack in enumerate(packs):
        number = index * ranks.world + ranks.rank  # its place in the loader's plan
        scalars.seed.fill_(dropout_seed(seed, step, number))
        is_last = index == len(packs) - 1
        with nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            passes.run(model, pack)
    totals = scalars.loss.new_empty(1 + len(counts))
    totals[0].copy_(scalars.loss)
    for place, count in enumerate(counts, start=1):
        totals[place].fill_(count)
    return ranks.sum(totals)


def _first_bad(optimizer: Optimizer) -> str:
    for name, parameter in optimizer.named.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"first tensor with a bad gradient: {name}"
    return ""
