"""One optimiser step: k packs forward and backward, one finite check, one update."""

from __future__ import annotations

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
    step: int, seed: int, lr: float, clip_grad: float | None, device: torch.device,
) -> StepResult:  # fmt: skip
    """Runs the packs of this rank and updates the weights once.

    An fp16 overflow repeats the same packs with a smaller loss scale, so no sample is lost.

    Raises:
        NotFinite: loss or gradient is not finite (with fp16: even at scale 1). No weight was touched.
    """
    while True:
        loss = _accumulate(model, packs, optimizer, scaler.scale, ranks, step=step, seed=seed, device=device)
        norm = optimizer.unscale_and_clip(scaler.scale, clip_grad)
        values = torch.stack((loss, norm)).tolist()  # the step's one wait for the device
        result = StepResult(loss=values[0], grad_norm=values[1])
        if _is_finite(result):
            break
        if not scaler.backoff():
            raise NotFinite(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}",
                where=_first_bad(model) or "the loss itself",
                why="no weight was changed by this step",
                do="lower --optim.lr, set --optim.clip_grad 1.0, or look at the rows of this step with --debug",
            )
    optimizer.step(lr)
    scaler.good_step()
    return result


def _accumulate(
    model: nn.Module, packs: Sequence[Pack], optimizer: Optimizer, scale: float, ranks: Ranks, *,
    step: int, seed: int, device: torch.device,
) -> Tensor:  # fmt: skip
    optimizer.zero_grad()
    total = torch.zeros((), device=device)
    for index, pack in enumerate(packs):
        number = dropout_seed(seed, step, index * ranks.world + ranks.rank)  # its place in the loader's plan
        pack_seed = torch.tensor([number], dtype=torch.int64).to(device, non_blocking=True)
        is_last = index == len(packs) - 1
        with nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            loss: Tensor = model(pack.to(device), pack_seed)
            (loss * (scale * ranks.world)).backward()  # DDP takes the mean over ranks; the step wants the sum
        total += loss.detach()
    return ranks.sum(total)


def _is_finite(result: StepResult) -> bool:
    return abs(result.loss) < float("inf") and abs(result.grad_norm) < float("inf")  # False for NaN


def _first_bad(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"first tensor with a bad gradient: {name}"
    return ""
