"""Out of memory at run time: what was planned, what torch holds, what to change, and what was saved.

Nothing that was saved is touched. The flags are planned anew on the model's shapes, which needs no memory of a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from engine.build import open_sources, vlm_config
from engine.checkpoint import find_latest
from engine.config import Config
from engine.errors import CheckpointError, NibbleError, OutOfMemory, as_nibble_error
from engine.memory_size import gib
from engine.plan.cards import CARDS, Card
from engine.plan.verdict import Planner
from engine.precision import choose_dtype
from engine.rundir import RunDir

logger = logging.getLogger("nibble")

REMEDIES = 2


@contextmanager
def explained(config: Config, device: torch.device, rundir: RunDir) -> Iterator[None]:
    """Turns an allocation that failed inside into the error that a person sees.

    Raises:
        OutOfMemory: in its place.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = as_nibble_error(error)
        if not isinstance(known, OutOfMemory) or isinstance(error, NibbleError):
            raise
        raise _explanation(known, config, device, rundir) from error


def _explanation(known: OutOfMemory, config: Config, device: torch.device, rundir: RunDir) -> OutOfMemory:
    saved = _saved(rundir)
    try:
        why, flags = _planned(config, device)
    except (NibbleError, ValueError, RuntimeError, OSError) as error:  # the plan is help, and must not hide the error
        logger.warning("no plan for the error below: %s", error)
        return OutOfMemory(known.what, where=f"{device}, {saved}", why=known.why, do=known.do)
    again = "the same command with --resume auto and " if saved.startswith("saved") else "the same command with "
    return OutOfMemory(
        known.what.partition("\n")[0], where=f"{device}; {saved}", why="\n".join(why),
        do=again + ", or ".join(" ".join(each) for each in flags) if flags else known.do,
    )  # fmt: skip


def _saved(rundir: RunDir) -> str:
    try:
        latest = find_latest(rundir.path, "size")
    except CheckpointError:
        latest = None
    return f"saved: {latest}" if latest is not None else f"nothing is saved in {rundir.path} yet"


def _planned(config: Config, device: torch.device) -> tuple[list[str], list[tuple[str, ...]]]:
    """The table of memory, and what takes less of it."""
    sources = open_sources(config)
    shapes = vlm_config(config, sources.language.config, sources.vision.config)
    full = "full" in (config.train.language, config.train.vision)
    dtype, _ = choose_dtype(config.runtime.precision, device, full_training=full)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    planner = Planner(shapes, num_ranks=ranks, dtype=dtype, on_cuda=device.type == "cuda")
    card = _card(device)
    found = planner.on(config, card)
    memory = found.memory
    table = [f"{gib(memory['total'])} were planned ({found.policy.describe()}):"]
    width = max(map(len, memory))
    table += [f"         {name:<{width}}  {gib(size):>10}" for name, size in memory.items() if size and name != "total"]
    table += _held(device)
    return table, list(islice(planner.savers(config, card), REMEDIES))


def _card(device: torch.device) -> Card:
    """The device as a card: its own memory, the rates of the first in the table, which do not matter here."""
    if device.type != "cuda":
        return CARDS[-1]
    return Card(str(device), torch.cuda.mem_get_info(device)[1], CARDS[0].capability, CARDS[0].rate, CARDS[0].bandwidth)


def _held(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    live, most, kept = (
        gib(size)
        for size in (
            torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device),
            torch.cuda.memory_reserved(device),
        )
    )  # fmt: skip
    return [
        f"       torch: {live} in tensors ({most} at most), {kept} kept from the driver; "
        f"the GPU: {gib(free)} of {gib(total)} free"
    ]
