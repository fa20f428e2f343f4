"""Out of memory at run time: what was planned, what torch holds, what to change, and what was saved.

Nothing that was saved is touched. The flags are planned anew on the model's shapes, which needs no memory of a GPU.
Where a checkpoint is there, only flags are named with which --resume goes on from it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch

from engine.architecture import model_of
from engine.checkpoint import find_latest
from engine.config import Config
from engine.distributed import Ranks
from engine.errors import CheckpointError, NibbleError, OutOfMemory, as_nibble_error, is_of_a_gpu
from engine.memory_size import gib
from engine.plan.cards import CARDS, Card, card_named
from engine.plan.memory_budget import CONTEXT_BYTES, MemoryChoice, card_of, device_memory
from engine.plan.remedies import Doing, savers
from engine.plan.verdict import Planner
from engine.precision import choose_dtype
from engine.rundir import RunDir
from engine.sources import open_sources
from models.recompute import ActivationPolicy

logger = logging.getLogger("nibble")

REMEDIES = 2
OTHERS = 2**30  # bytes of a GPU that somebody else holds: worth a word
FOR_THE_HOST = "end other programs on this machine, or lower --dataset.num_workers"


@dataclass(slots=True)
class Attempt:
    """A run, and what an error has to know of it."""

    config: Config
    device: torch.device
    rundir: RunDir
    ranks: Ranks
    doing: Doing = "loading"
    choice: MemoryChoice | None = None  # what the run has made of the memory

    def begin_training(self, policy: ActivationPolicy, spare: int) -> None:
        """Everything is built; `spare`: bytes for unpacked copies."""
        self.doing, self.choice = "training", MemoryChoice(policy, spare, "")

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside: the model is evaluated. An error leaves `doing` as it is."""
        before, self.doing = self.doing, "scoring"
        yield
        self.doing = before


def present_card(device: torch.device) -> Card | None:
    """The GPU of a run as a card: its name, what this process may have of it now, the rates of its kind. None: it is
    none."""
    known = card_of(device)
    if known is None:
        return None
    name = torch.cuda.get_device_name(device)
    if card_named(name) is None:
        name = f"{name} (taken to be as fast as {known.name})"
    return replace(known, name=name, memory=device_memory(device)[1])


@contextmanager
def explained(attempt: Attempt) -> Iterator[Attempt]:
    """Turns an allocation that failed inside into the error that a person sees.

    Raises:
        OutOfMemory: in its place.
    """
    try:
        yield attempt
    except (MemoryError, RuntimeError, OSError) as error:
        known = as_nibble_error(error)
        if not isinstance(known, OutOfMemory) or isinstance(error, NibbleError):
            raise
        if attempt.device.type == "cuda" and not is_of_a_gpu(error):
            raise _of_the_host(known, attempt) from error
        raise _explanation(known, attempt) from error


def _of_the_host(known: OutOfMemory, attempt: Attempt) -> OutOfMemory:
    return OutOfMemory(
        known.what.partition("\n")[0], where=_where(attempt, "the host"), do=FOR_THE_HOST,
        why=f"the memory of the machine has ended, not that of the GPU, while {_doing(attempt)}",
    )  # fmt: skip


def _explanation(known: OutOfMemory, attempt: Attempt) -> OutOfMemory:
    try:
        table, flags = _planned(attempt)
    except (NibbleError, ValueError, RuntimeError, OSError, MemoryError) as error:  # help must not hide the error
        logger.warning("no plan for the error below: %s", error)
        return OutOfMemory(known.what, where=_where(attempt), why=known.why, do=known.do)
    choices = ", or ".join(" ".join(each) for each in flags)
    do = f"{_again(attempt)} {choices}" if flags else _nothing_helps(attempt)
    why = "\n".join([f"while {_doing(attempt)}; {table[0]}", *table[1:]])
    return OutOfMemory(known.what.partition("\n")[0], where=_where(attempt), why=why, do=do)


def _nothing_helps(attempt: Attempt) -> str:
    more = "a GPU with more memory" if attempt.device.type == "cuda" else "a machine with more memory"
    config, saved = attempt.config, _latest(attempt.rundir)
    smaller = config.train.language != "full" and config.bits != "4bit"
    if saved and smaller:
        return f"{more}, or a new run with --bits 4bit --adapter.init {saved.rpartition('/')[0]}"
    return f"no flag takes clearly less: {more}"


def _doing(attempt: Attempt) -> str:
    return {
        "loading": "the model was loaded", "training": "training", "scoring": "the model was evaluated"
    }[attempt.doing]  # fmt: skip


def _again(attempt: Attempt) -> str:
    """How the command begins that goes on from what is saved."""
    return "the same command with --resume auto and" if _latest(attempt.rundir) else "the same command with"


def _where(attempt: Attempt, place: str = "") -> str:
    rank = f", rank {attempt.ranks.rank} of {attempt.ranks.world}" if attempt.ranks.world > 1 else ""
    latest = _latest(attempt.rundir)
    saved = f"saved: {latest}" if latest else f"nothing is saved in {attempt.rundir.path} yet"
    return f"{place or attempt.device}{rank}; {saved}"


def _latest(rundir: RunDir) -> str:
    """The newest checkpoint; empty where none is."""
    try:
        latest = find_latest(rundir.path, "size")
    except CheckpointError:
        latest = None
    return "" if latest is None else str(latest)


def _planned(attempt: Attempt) -> tuple[list[str], list[tuple[str, ...]]]:
    """The table of memory, and what takes less of it."""
    config, device, choice = attempt.config, attempt.device, attempt.choice
    sources = open_sources(config)
    shapes = model_of(config, sources)
    full = "full" in (config.train.language, config.train.vision)
    dtype, _ = choose_dtype(config.runtime.precision, device, full_training=full)
    planner = Planner(shapes, num_ranks=attempt.ranks.world, dtype=dtype, on_cuda=device.type == "cuda")
    card = present_card(device) or CARDS[-1]
    found = planner.on(config, card, choice)
    memory = found.memory
    table = [f"{gib(memory['total'])} were planned ({found.policy.describe()}):"]
    width = max(map(len, memory))
    table += [f"         {name:<{width}}  {gib(size):>10}" for name, size in memory.items() if size and name != "total"]
    table += _held(device)
    if attempt.doing == "training" and attempt.ranks.world == 1 and choice is not None:
        config = copy.deepcopy(config)  # the step gave the copies up (engine/step.py), and that was not enough
        config.runtime.unpacked_memory, choice = "0", replace(choice, spare=0)
    less = savers(planner, config, card, choice, attempt.doing, same_bits=bool(_latest(attempt.rundir)))
    return table, list(islice(less, REMEDIES))


def _held(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    live, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    lines = [
        f"       torch: {gib(live)} in tensors ({gib(most)} at most), {gib(reserved)} kept from the driver; "
        f"the GPU: {gib(free)} of {gib(total)} free"
    ]
    others = total - free - reserved - CONTEXT_BYTES
    if others > OTHERS:
        lines.append(f"       other processes hold {gib(others)} of the GPU (nvidia-smi names them)")
    return lines
