"""--runtime.unpacked_memory, prefetch: what a run does with memory for 16-bit copies of its quantised weights.

An op unpacks the weights that it multiplies by, a group, into a buffer that all groups share: the memory of the largest
group, which is always there (a quantised head is one too); with prefetch, that of a layer, so that the next group has
room beside the present one.
What is asked for beyond it buys, in this order:

    a scratch of one layer, with gradient checkpointing: a layer's backward follows its recomputation and finds the
        weights that this has unpacked; otherwise they are unpacked twice
    permanent copies of k layers, which are then never unpacked: as many as the rest holds. A copy saves the same
        wherever its layer is; the last layers are taken, so that two runs choose the same ones, and because the
        backward pass begins with them

Where all layers fit, nothing of them is left to unpack, and no scratch is needed. Copies change no bit of a result.
"auto" asks for what the memory budget of a training run leaves (memory_budget.py), and elsewhere for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.checks import about_unpacking
from engine.config import BITS, Config
from engine.memory_size import gib, parse_size
from kernels import unpacked
from kernels.linear_nf4 import set_few_rows
from models.language.decoder import Decoder
from models.linear import Linear, pack_of

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Share:
    """How the memory is divided. Bytes."""

    scratch: int  # what is unpacked again and again goes here
    copies: int
    num_copied: int  # k, the last layers of the language model
    why: str


def divide(
    budget: int, layers: Sequence[Sequence[int]], *, checkpointing: bool, prefetch: bool, head: int = 0
) -> Share:
    """Divides `budget` bytes; `layers` has, for each layer, the unpacked bytes of its groups, `head` are those of a
    quantised head.

    scratch + copies is at most the budget, or else the largest group (with prefetch, the largest layer).
    """
    sizes, largest = [sum(groups) for groups in layers], max(head, *(max(groups) for groups in layers))
    if budget >= sum(sizes) + head:
        return Share(head, sum(sizes), len(sizes), f"all {len(sizes)} layers fit")
    least = max(head, *sizes) if prefetch else largest
    scratch = max(least, min(budget, max(sizes))) if checkpointing else least
    left, copied = budget - scratch, 0
    while sizes[-1 - copied] <= left:
        left -= sizes[-1 - copied]
        copied += 1
    why = f"{gib(left)} left, the next layer takes {gib(sizes[-1 - copied])}" if left >= 0 else "no memory for more"
    if checkpointing and scratch > largest:
        why = f"recomputation and backward share what is unpacked; {why}"
    return Share(scratch, budget - scratch - left, copied, why)


def share_of(config: Config, model: Decoder, itemsize: int, *, on_cuda: bool, spare: int = 0) -> Share | None:
    """What this configuration does with activations of `itemsize` bytes; None where no layer is quantised. The model
    may be on the meta device and without weights. `spare`: bytes that "auto" takes beyond what is always there."""
    if BITS[config.bits] == 16:
        return None
    layers, head = _sizes(config, model, itemsize)
    least = least_scratch(config, model, itemsize, on_cuda=on_cuda)
    asked = config.runtime.unpacked_memory
    budget = (least + spare if asked == "auto" else parse_size(asked)) if on_cuda else 0
    recomputing = config.gradient_checkpointing or any(block.policy == "keep_input" for block in model.blocks())
    prefetch = config.runtime.prefetch and on_cuda
    return divide(budget, layers, checkpointing=recomputing, prefetch=prefetch, head=head)


def asked_for(config: Config, model: Decoder, itemsize: int, *, on_cuda: bool) -> int:
    """Most bytes beyond `least_scratch` that become of an explicit --runtime.unpacked_memory, whatever layers keep; 0
    for "auto", which takes what is left."""
    asked = config.runtime.unpacked_memory
    if BITS[config.bits] == 16 or asked == "auto" or not on_cuda:
        return 0
    layers, head = _sizes(config, model, itemsize)
    shares = (
        divide(parse_size(asked), layers, checkpointing=recomputing, prefetch=config.runtime.prefetch, head=head)
        for recomputing in (False, True)
    )
    least = least_scratch(config, model, itemsize, on_cuda=on_cuda)
    return max(0, max(share.scratch + share.copies for share in shares) - least)


def least_scratch(config: Config, model: Decoder, itemsize: int, *, on_cuda: bool) -> int:
    """Bytes of the buffer that is there whatever is asked for; 0 where no layer is quantised."""
    if BITS[config.bits] == 16:
        return 0
    layers, head = _sizes(config, model, itemsize)
    return divide(0, layers, checkpointing=False, prefetch=config.runtime.prefetch and on_cuda, head=head).scratch


def _sizes(config: Config, model: Decoder, itemsize: int) -> tuple[list[list[int]], int]:
    """Unpacked bytes of each layer's groups, and of the head where it is quantised."""
    layers = [[_unpacked_bytes(group, itemsize) for group in block.groups()] for block in model.blocks()]
    return layers, 0 if BITS[config.bits_head] == 16 else _unpacked_bytes((model.head,), itemsize)


def _unpacked_bytes(group: Sequence[Linear], itemsize: int) -> int:
    weights = sum(linear.in_features * linear.out_features for linear in group)
    return itemsize * -(-weights // unpacked.ALIGNMENT) * unpacked.ALIGNMENT


def use_memory(config: Config, model: Decoder, device: torch.device, dtype: torch.dtype, spare: int = 0) -> str:
    """Makes the copies, for this process, and passes on the other settings of packed weights; after the weights have
    their last place and value. `spare` as in `share_of`. Returns what was done."""
    share = share_of(config, model, dtype.itemsize, on_cuda=device.type == "cuda", spare=spare)
    if share is None:
        return ""
    if device.type != "cuda":
        for name in (
            about_unpacking(config.runtime) if config.runtime.device != "cpu" else ()
        ):  # else the flags have said it
            logger.warning("--runtime.%s has no effect: this run is on the CPU", name)
        return ""
    set_few_rows(config.runtime.few_rows)
    unpacked.configure(scratch_bytes=share.scratch, prefetch=config.runtime.prefetch)
    for block in model.blocks()[len(model.layers) - share.num_copied :]:
        for group in block.groups():
            unpacked.keep(pack_of(group), dtype)
    return share_text(share, len(model.layers))


def share_text(share: Share, num_layers: int) -> str:
    """The share as a line of the run's output."""
    return (
        f"buffer of {gib(share.scratch)}, copies of {share.num_copied} of {num_layers} layers {gib(share.copies)} "
        f"({share.why})"
    )
