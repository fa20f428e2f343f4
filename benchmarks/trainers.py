"""What trains in benchmarks of whole optimiser steps: the engine's own step here, peers in their own modules.

prepare(workload)   untimed: what a loader's threads do ahead of a step, tensors in pinned memory
step(batch)         timed: forward, backward and update; returns the step's loss, so it waits once at least
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.workload import Workload
from engine.data.packing import LAVIN, PackForm, Reduction, collate, form_of, plan_packs, token_weights
from engine.data.padding import pad
from engine.distributed import Ranks
from engine.graphs import CudaRecorder, GraphedPasses, Passes
from engine.optim import Optimizer
from engine.scaler import LossScaler
from engine.step import train_step
from models.pack import Pack
from models.vlm import VisionLanguageModel

WEIGHT_DECAY, BETAS = 0.02, (0.9, 0.95)  # LaVIN's
LR = 1e-4  # of steps that are only timed; the weights are random


class Trainer(Protocol):
    """One implementation of a step, with its model and optimizer."""

    warm_ups: int  # steps on the same samples before a step is what all later ones are
    borrowed_bytes: int  # of the weights that others of the process hold: they count here too

    def prepare(self, work: Workload) -> Any: ...

    def step(self, batch: Any) -> float: ...

    def launched(self) -> str:
        """How its passes were launched, where there is more than one way."""


class NibbleTrainer:
    """The engine: its planner, its packs, its step; on a GPU as CUDA graphs, as by default.

    Args:
        tokens: of a pack, at most.
        reduction: how targets are weighed; LaVIN's micro-batch of one is `sample`.
    """

    def __init__(
        self, vlm: VisionLanguageModel, tokens: int, device: torch.device, *, lr: float = LR,
        reduction: Reduction = "sample", seed: int = 0,
    ) -> None:  # fmt: skip
        self.warm_ups = 3  # op by op, captured, replayed
        self.vlm, self.tokens, self.device = vlm, tokens, device
        self.lr, self.seed = lr, seed
        self.reduction: Reduction = reduction
        self.borrowed_bytes = 0
        vlm.train()
        self.optimizer = Optimizer(vlm.named_parameters(), weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1])
        dtype = vlm.language.embed.weight.dtype
        self.scaler, self.ranks = LossScaler(dtype == torch.float16), Ranks(0, 0, 1)
        self.passes = GraphedPasses(device, CudaRecorder(device)) if device.type == "cuda" else Passes(device)
        self.steps = 0

    def prepare(self, work: Workload) -> list[Pack]:
        """As the loader does it (engine/data/loader.py)."""
        form = form_of(self.vlm.config)
        packs = packs_of(work, self.tokens, self.reduction, form)
        return [pad(pack, form.tile_tokens).pin_memory() for pack in packs] if self.device.type == "cuda" else packs

    def step(self, batch: list[Pack]) -> float:
        result = train_step(
            self.vlm, batch, self.optimizer, self.scaler, self.ranks,
            step=self.steps, seed=self.seed, lr=self.lr, clip_grad=None, device=self.device, passes=self.passes,
        )  # fmt: skip
        self.steps += 1
        return result.loss

    def launched(self) -> str:
        passes = self.passes
        if not isinstance(passes, GraphedPasses):
            return ""
        return f"{passes.replayed} of {passes.replayed + passes.launched} passes by CUDA graphs"


def packs_of(work: Workload, tokens: int, reduction: Reduction, form: PackForm = LAVIN) -> list[Pack]:
    """A step's packs of at most `tokens`."""
    plan = plan_packs(
        [len(sample.input_ids) for sample in work.samples], tokens,
        tiles=[int(tile is not None) for tile in work.tiles], modality=form.modality,
    )  # fmt: skip
    weights = token_weights(work.samples, reduction)
    return [
        collate([work.samples[i] for i in pack], [weights[i] for i in pack], [work.tiles[i] for i in pack], form=form)
        for pack in plan
    ]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In memory that a copy to `device` need not wait for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
