"""The loop: steps, log lines, validation, checkpoints, a graceful stop. What a run is made of is in engine/run.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import save_checkpoint
from engine.config import Config
from engine.data.loader import StepLoader
from engine.data.packing import filled_tokens
from engine.distributed import Ranks
from engine.errors import Stopped
from engine.graphs import Passes
from engine.metrics import Ema, Metrics
from engine.optim import Optimizer
from engine.progress import Progress
from engine.rundir import RunDir
from engine.scaler import LossScaler
from engine.schedule import CosineSchedule
from engine.signals import StopSignals
from engine.starting import put_back
from engine.step import StepResult, train_step
from models.pack import Pack
from models.vlm import VisionLanguageModel


@dataclass
class Counters:
    """What a run has done so far; part of its checkpoints."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    packed_tokens: int = 0  # with the filling of packs
    seconds: float = 0.0  # of steps, waiting for data included, without validation and saving
    best_step: int = -1
    best_loss: float = float("inf")


@dataclass
class Trainer:
    """Everything a training run holds. `train` runs from `counters.step` to `total_steps`."""

    config: Config
    model: VisionLanguageModel
    wrapped: nn.Module  # the model, or DDP around it
    loader: StepLoader
    passes: Passes
    optimizer: Optimizer
    schedule: CosineSchedule
    scaler: LossScaler
    rundir: RunDir
    metrics: Metrics | None  # on the main rank
    ranks: Ranks
    device: torch.device
    steps_per_epoch: int
    validate: Callable[[], float] | None  # the validation loss, the same on every rank
    on_epoch_end: Callable[[int], None]  # called with the epoch's number, on the main rank
    state_extras: dict[str, Any]  # what a checkpoint records besides: identity of the base, choices made
    max_steps: int | None = None  # ends the run earlier than its epochs
    counters: Counters = field(default_factory=Counters)
    loss_ema: Ema = field(default_factory=Ema)

    @property
    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.config.optim.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def train(self, progress: Progress, stop: StopSignals) -> None:
        """Trains to the end.

        Raises:
            Stopped: a signal asked for it; a checkpoint of this very step is written.
            NotFinite: see `train_step`; nothing that was saved is touched.
        """
        first = self.counters.step
        with closing(self.loader.steps(first, self.total_steps)) as prepared:  # its threads end with the run
            for step in range(first, self.total_steps):
                start = time.perf_counter()
                packs = next(prepared)
                waited = time.perf_counter() - start
                result = self._step(step, packs)
                seconds = time.perf_counter() - start
                fields = self._count(step, result, seconds) | {"data_ms": 1000 * waited}
                self._after_step(step + 1, fields, progress, stop)
        self.passes.release()

    def _after_step(self, done: int, fields: dict[str, float], progress: Progress, stop: StopSignals) -> None:
        """Logs, validates and saves where it is due; leaves where a signal asked for it."""
        save_every = self.config.log.save_every or self.steps_per_epoch
        is_last = done == self.total_steps
        progress.update(done, **fields | {"loss": fields["loss_ema"]})
        if self._due(done, self.config.log.every) or done == 1 or is_last:
            self._log(done, fields)
        is_best = False
        if self.validate is not None and (self._due(done, self.config.eval_every) or is_last):
            is_best = self._validate(done, progress)
        if done % self.steps_per_epoch == 0:
            self._end_epoch(done // self.steps_per_epoch - 1, progress)
        stopping = self.ranks.any(stop.stop_requested(), self.device)
        if self._due(done, save_every) or is_best or stopping or is_last:
            self.save()
        if stopping and not is_last:
            raise Stopped(
                f"stopped on request at step {done} of {self.total_steps}", where=str(self.rundir.path),
                do="type the same command with --resume auto",
            )  # fmt: skip

    def _end_epoch(self, epoch: int, progress: Progress) -> None:
        for remark in self.loader.remarks if epoch == 0 else ():
            progress.note(remark)
        if self.ranks.is_main:
            self.on_epoch_end(epoch)

    @staticmethod
    def _due(done: int, every: int) -> bool:
        return every > 0 and done % every == 0

    def _step(self, step: int, packs: list[Pack]) -> StepResult:
        return train_step(
            self.wrapped, packs, self.optimizer, self.scaler, self.ranks,
            step=step, seed=self.config.seed, lr=self.schedule(step), clip_grad=self.config.optim.clip_grad,
            device=self.device, counts=(sum(map(filled_tokens, packs)), sum(p.input_ids.numel() for p in packs)),
            passes=self.passes,
        )  # fmt: skip

    def _count(self, step: int, result: StepResult, seconds: float) -> dict[str, float]:
        """Adds the step to the counters; returns its row of metrics."""
        tokens, packed = result.counts
        c = self.counters
        c.tokens += int(tokens)
        c.packed_tokens += int(packed)
        c.samples += self.config.optim.samples_per_step(self.ranks.world)
        c.seconds += seconds
        c.step = step + 1
        return {
            "epoch": c.step / self.steps_per_epoch, "samples": c.samples, "tokens": c.tokens,
            "loss": result.loss, "loss_ema": self.loss_ema.update(result.loss), "lr": self.schedule(step),
            "grad_norm": result.grad_norm, "loss_scale": self.scaler.scale, "step_ms": 1000 * seconds,
            "tok_s": c.tokens / c.seconds, "samples_s": c.samples / c.seconds, "packing": c.tokens / c.packed_tokens,
        }  # fmt: skip

    def _log(self, step: int, fields: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(step, **fields)

    def _validate(self, step: int, progress: Progress) -> bool:
        """Returns whether this step is the best so far, and to be saved for that."""
        assert self.validate is not None
        loss = self.validate()
        self._log(step, {"eval_loss": loss})
        is_best = loss < self.counters.best_loss
        if is_best:
            self.counters.best_loss, self.counters.best_step = loss, step
        progress.note(f"step {step}: validation loss {loss:.4f}{' (best so far)' if is_best else ''}")
        return is_best

    def save(self) -> None:
        """Writes a checkpoint of this step (main rank; the others wait)."""
        if self.ranks.is_main:
            tensors: dict[str, Tensor] = {n: p.detach() for n, p in self.model.trainable().items()}
            tensors |= self.optimizer.state_tensors()
            state = {
                "counters": asdict(self.counters),
                "loss_ema": self.loss_ema.state(),
                "scaler": self.scaler.state(),
                "seed": self.config.seed,
                **self.state_extras,
            }
            best = self.counters.best_step if self.counters.best_step >= 0 else None
            save_checkpoint(self.rundir.path, self.counters.step, tensors, state, keep=self.config.log.keep, best=best)
        self.ranks.barrier()

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any], path: Path) -> None:
        """Puts back what was read from the checkpoint at `path`. Raises WeightsError where it does not fit."""
        put_back(self.model.trainable(), {n: t for n, t in tensors.items() if "/" not in n}, path)
        self.optimizer.load_state_tensors(tensors)
        self.scaler.load(state["scaler"])
        self.loss_ema.load(state["loss_ema"])
        self.counters = Counters(**state["counters"])
