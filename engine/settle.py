"""What a run's layers keep for their backward pass, settled once weights, gradients and optimiser have their memory.

The main rank chooses (engine/plan/memory_budget.py) by what is free there and says why. Checkpoints record it: a
resumed run takes it up, unless its command asks for something else.
"""

from __future__ import annotations

import logging

import torch

from engine.config import Config, get
from engine.plan.memory_budget import MemoryChoice, card_of, choose, device_memory, free_bytes, resident_bytes
from engine.setup import Setup
from engine.trainer import Trainer
from models.recompute import ActivationPolicy

logger = logging.getLogger("nibble")

# What a choice depends on and a resumed run may be asked for anew.
ASKED = (
    "gradient_checkpointing", "memory_budget", "runtime.tokens_per_batch", "runtime.unpacked_memory",
    "runtime.prefetch", "runtime.precision",
)  # fmt: skip
RECORDED = ("activation_policy", "spare_memory", "memory_asked")  # in the state of checkpoints


def settle_memory(setup: Setup, trainer: Trainer, dtype: torch.dtype) -> int:
    """Chooses, or takes up what the resumed run chose; applies, says and records it. Returns the bytes that are
    left."""
    config, model, extras = setup.config, setup.model, trainer.state_extras
    asked = [get(config, path) for path in ASKED]
    if extras.get("memory_asked") == asked:
        policy = ActivationPolicy.from_json(extras["activation_policy"])
        choice = MemoryChoice(policy, extras["spare_memory"], "as the run that is resumed")
    else:

        def make() -> MemoryChoice:
            free = free_of(config, trainer, setup.device)
            return choose(config, model, free, card_of(setup.device), dtype)

        choice = setup.ranks.from_main(make)
    if not choice.fits:
        logger.warning(
            "%s: expect to run out of memory; a smaller --runtime.tokens_per_batch takes less", choice.why
        )  # fmt: skip
    model.use_activation_policy(choice.policy)
    recorded = choice.policy.to_json(), choice.spare, asked
    extras |= dict(zip(RECORDED, recorded, strict=True))
    setup.ranks.say(f"keeps      {choice.policy.describe()} ({choice.why})")
    return choice.spare


def free_of(config: Config, trainer: Trainer, device: torch.device) -> int | None:
    """Bytes that are free for a pass over a pack; None: any number."""
    if device.type == "cuda":
        return free_bytes(config, *device_memory(device))
    return free_bytes(config, resident_bytes(trainer.model, trainer.optimizer.state_tensors()), None)
