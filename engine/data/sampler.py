"""Which samples make up step i: one permutation an epoch, cut into steps."""

from __future__ import annotations

import hashlib
import threading

import torch

from engine.errors import DataError


class StepSampler:
    """Steps of `samples_per_step` samples. What is left at the end of an epoch and fills no step is dropped.

    The order depends on (seed, epoch) and the number of samples only, so it is the same on any number of ranks, and
    any step is found without walking there.

    Raises:
        DataError: the data set has fewer samples than one step.
    """

    def __init__(self, num_samples: int, samples_per_step: int, seed: int) -> None:
        if num_samples < samples_per_step:
            raise DataError(
                f"the data has {num_samples} samples, one step takes {samples_per_step}",
                do="lower --optim.batch_size or --optim.accum_iter, or add rows",
            )
        self.num_samples = num_samples
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.steps_per_epoch = num_samples // samples_per_step
        self._permutations: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def indices(self, step: int) -> list[int]:
        """The samples of step 0, 1, 2, ..., counted over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.samples_per_step
        return self._permutation(epoch)[start : start + self.samples_per_step]

    def step_share(self, micro_batch: int) -> float:
        """The share of an epoch that one step advances. Samples that fill no micro-batch of all ranks do not count."""
        return self.samples_per_step / (self.num_samples // micro_batch * micro_batch)

    def _permutation(self, epoch: int) -> list[int]:
        with self._lock:
            if epoch not in self._permutations:
                # torch's CPU generator takes 32 bits of its seed, so both numbers are hashed into these
                digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
                order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
                # steps of two epochs are prepared at once at most
                self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1} | {epoch: order}
            return self._permutations[epoch]
