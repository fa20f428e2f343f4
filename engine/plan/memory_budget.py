"""--memory_budget, --gradient_checkpointing: what the layers of a run keep for their backward pass.

What is free once weights, gradients and optimiser state are in place, less a reserve, is divided over the largest pack
that the run can meet (accounting.py counts it): first what there is no choice about, then what layers keep, by the
assignment of least recomputation that fits (activation_policy.py). What is left goes to unpacked copies of quantised
weights (--runtime.unpacked_memory auto): a byte of them saves less time than a byte kept for the backward pass.

    on a GPU    free: what the driver says, and at most --memory_budget with the CUDA context in it
    on a CPU    no limit, and nothing is counted; with --memory_budget that less what is there, in 32 bits

The choice is made on the main rank, printed with its reason, and recorded in checkpoints: a resumed run takes it up,
unless its command asks for something else. It changes no bit of a run's results.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.build import BITS
from engine.config import Config
from engine.data.planning import most_tiles, round_up
from engine.memory_size import gib, parse_size
from engine.plan.accounting import costs
from engine.plan.activation_policy import solve
from engine.plan.cards import CARDS, Card, card_named
from engine.plan.meta_model import Bits, PackShape
from engine.plan.unpacked_memory import least_scratch
from engine.setup import Setup
from engine.trainer import Trainer
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel

logger = logging.getLogger("nibble")

RECORDED = ("activation_policy", "spare_memory", "memory_asked")  # in the state of checkpoints
RESERVE = 0.05  # of what is free: what the allocator loses between blocks, workspaces of libraries
CONTEXT_BYTES = 512 * 2**20  # CUDA context and the code of kernels, outside of the allocator
HOST = Card("CPU", memory=0, capability=0, rate=1e11, bandwidth=1e10)  # to compare recomputations: any one


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What was chosen, and why."""

    policy: ActivationPolicy
    spare: int  # bytes that nothing needs: for --runtime.unpacked_memory auto
    why: str


def settle_memory(setup: Setup, trainer: Trainer, dtype: torch.dtype) -> int:
    """Chooses, or takes up what the resumed run chose; applies, says and records it. After weights, gradients and
    optimiser have their memory. Returns the bytes that are left."""
    config, model, extras = setup.config, setup.model, trainer.state_extras
    asked = [config.gradient_checkpointing, config.memory_budget, config.runtime.tokens_per_batch]
    if extras.get("memory_asked") == asked:
        policy = ActivationPolicy.from_json(extras["activation_policy"])
        choice = MemoryChoice(policy, extras["spare_memory"], "as the run that is resumed")
    else:

        def make() -> MemoryChoice:
            return choose(config, model, free_bytes(config, trainer, setup.device), setup.device, dtype)

        choice = setup.ranks.from_main(make)
    model.use_activation_policy(choice.policy)
    recorded = choice.policy.to_json(), choice.spare, asked
    extras |= dict(zip(RECORDED, recorded, strict=True))
    setup.ranks.say(f"keeps      {choice.policy.describe()} ({choice.why})")
    return choice.spare


def choose(
    config: Config, model: VisionLanguageModel, free: int | None, device: torch.device, dtype: torch.dtype
) -> MemoryChoice:
    """What the layers of `model` keep where `free` bytes are there for it and for buffers; None: any number.

    Where nothing fits it is the leanest choice, and a warning: the figures are predictions.
    """
    num_language, num_vision = len(model.language.layers), len(model.vision.layers)
    if config.gradient_checkpointing:
        leanest = ActivationPolicy.uniform("keep_input", num_language, num_vision)
        return MemoryChoice(leanest, 0, "--gradient_checkpointing")
    if free is None:
        everything = ActivationPolicy.uniform("save_all", num_language, num_vision)
        return MemoryChoice(everything, 0, "on a CPU, without --memory_budget")
    pack = largest_pack(config)
    bits = Bits(BITS[config.bits], BITS[config.bits_head], BITS[config.bits_vision])
    scratch = least_scratch(config, model.language, dtype.itemsize, on_cuda=device.type == "cuda")
    found = costs(model.config, bits, pack, dtype, card_of(device), scratch=scratch)
    budget = free - found.inputs - found.buffers
    solution = solve(found.stages, found.after, budget)
    vision, language = solution.policies
    policy = ActivationPolicy(language, vision)
    why = (
        f"a pack of {pack.tokens:,} tokens is predicted to take {gib(solution.peak)}, {gib(max(0, budget))} are free"
        + (f"; {1000 * solution.seconds:.0f} ms of recomputation" if solution.seconds else "")
    )
    if not solution.fits:
        logger.warning("%s: expect to run out of memory; a smaller --runtime.tokens_per_batch takes less", why)
    return MemoryChoice(policy, max(0, budget - solution.peak), why)


def largest_pack(config: Config) -> PackShape:
    """The largest pack that a run can meet, padded as for CUDA graphs, with every row supervised. Its attention is
    that of samples half as long as the longest."""
    tokens = round_up(max(config.runtime.tokens_per_batch, config.dataset.max_seq_len))
    multiple = max(2, -(-tokens // 1024))
    return PackShape(
        tokens=tokens,
        supervised=tokens,
        segments=16 * -(-tokens // 2048),
        tiles=-(-most_tiles(config.runtime.tokens_per_batch) // multiple) * multiple,
        pairs=tokens * config.dataset.max_seq_len // 4,
        longest=config.dataset.max_seq_len,
    )


def free_bytes(config: Config, trainer: Trainer, device: torch.device) -> int | None:
    """Bytes that are free for a pass over a pack; None: no limit."""
    asked = parse_size(config.memory_budget) if config.memory_budget else None
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        idle = free + torch.cuda.memory_reserved(device) - allocated
        if asked is not None:
            idle = min(idle, asked - CONTEXT_BYTES - allocated)
        return int(idle * (1 - RESERVE))
    return None if asked is None else asked - resident_bytes(trainer.model, trainer.optimizer.state_tensors())


def resident_bytes(model: VisionLanguageModel, state: Mapping[str, Tensor]) -> int:
    """Bytes of weights, gradients and optimiser state, each memory once."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    tensors = (*model.parameters(), *model.buffers(), *gradients, *state.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def card_of(device: torch.device) -> Card:
    """What is known of the card; one that is not in the table counts as the nearest one by compute capability."""
    if device.type != "cuda":
        return HOST
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return card_named(torch.cuda.get_device_name(device)) or min(
        CARDS, key=lambda card: abs(card.capability - capability)
    )
