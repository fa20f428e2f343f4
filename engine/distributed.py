"""The ranks that torchrun started: who am I, wrap the model, agree with the others."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import NibbleError
from engine.precision import choose_device

T = TypeVar("T")

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `world` equal ones."""

    rank: int
    local_rank: int
    world: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP when there are several ranks. Every rank's last pack of a step touches every parameter (the loader adds
        a dummy tile where no image is), so nothing has to be searched for. Gradients are views of the optimiser's
        buffers, and stay there."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over ranks, on every rank (in place)."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on at least one rank: the same answer everywhere."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item() > 0)

    def say(self, text: str) -> None:
        """One rank tells it to the terminal and to log.txt."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)
            logger.info("%s", text)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, which alone calls it, on every rank; small and picklable.

        An error is raised and told by the main rank alone; the others leave with its exit code, so that none of them
        waits for a rank that is gone.
        """
        if self.world == 1:
            return make()
        message: list[Any] = [None, 1]  # what was made, and the exit code where nothing was
        try:
            if self.is_main:
                message = [make(), 0]
        except NibbleError as error:
            message = [None, error.exit_code]
            raise
        finally:
            dist.broadcast_object_list(message)
        made, code = message
        if code:
            raise SystemExit(code)
        return made


@contextmanager
def ranks(device_type: str) -> Iterator[Ranks]:
    """Joins the process group that torchrun's environment describes; leaves it at the end.

    Raises:
        EnvironmentProblem: `device_type` is cuda and this rank has no GPU.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    me = Ranks(rank=int(os.environ.get("RANK", "0")), local_rank=int(os.environ.get("LOCAL_RANK", "0")), world=world)
    if world > 1:
        gpu = choose_device("cuda", me.local_rank) if device_type == "cuda" else None
        if gpu is not None:
            torch.cuda.set_device(gpu)  # before NCCL, which would else take the first GPU for every rank
        dist.init_process_group("gloo" if gpu is None else "nccl", timeout=timedelta(minutes=30), device_id=gpu)
    try:
        yield me
    finally:
        if world > 1:
            dist.destroy_process_group()
