"""The learning rate as a function of the step: LaVIN's linear warm-up and cosine, both in fractional epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineSchedule:
    """LaVIN (arXiv 2305.15023): with e = the epoch + the share of its samples that were seen,

        e < warmup_epochs:  lr * e / warmup_epochs                       (0 at step 0)
        else:               min_lr + (lr - min_lr) * (1 + cos(pi * p)) / 2,  p = (e - warmup) / (epochs - warmup)

    p ends at 1, so a run that is continued past its last epoch stays at min_lr.
    """

    lr: float  # the peak: Optim.peak_lr()
    min_lr: float
    epochs: float
    warmup_epochs: float
    steps_per_epoch: int
    step_share: float  # of an epoch, that one step advances: less than 1 / steps where some samples fill no step

    def __call__(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        whole, within = divmod(step, self.steps_per_epoch)
        epoch = whole + within * self.step_share
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        decay_epochs = self.epochs - self.warmup_epochs
        progress = min(1.0, (epoch - self.warmup_epochs) / decay_epochs) if decay_epochs > 0 else 1.0
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
