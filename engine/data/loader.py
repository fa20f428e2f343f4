"""The packs of each step for one rank, prepared ahead by threads. Any number of threads gives the same packs."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from engine.data.images import TileReader
from engine.data.packing import Reduction, collate, first_of_micro_batch, token_weights
from engine.data.planning import plan_packs
from engine.data.sample import Dataset, Sample
from models.pack import Pack


class StepOrder(Protocol):
    """What the loader needs of a sampler."""

    def indices(self, step: int) -> Sequence[int]:
        """The samples of a step, of all ranks together."""
        ...


class StepLoader:
    """Packs of `rank` out of `ranks`. Every rank has the same number of packs in a step, and where there are several
    ranks the last pack of each has a tile (of zeros and without image slots where need be): every trained parameter
    then takes part in the one backward pass whose gradients DDP exchanges.

    Args:
        micro_batch: samples of the micro-batch of the recipe, for the `micro_batch` reduction and LaVIN's CLIP router.
        legacy_clip_router: the first sample of each micro-batch routes all its tiles in the tower's adapters.
        num_workers: threads, each preparing a whole step; 0 prepares a step when it is asked for.
    """

    def __init__(
        self, dataset: Dataset, order: StepOrder, reader: TileReader, *, tokens_per_batch: int, reduction: Reduction,
        micro_batch: int, rank: int = 0, ranks: int = 1, num_workers: int = 0, legacy_clip_router: bool = False,
    ) -> None:  # fmt: skip
        self.dataset = dataset
        self.order = order
        self.reader = reader
        self.tokens_per_batch = tokens_per_batch
        self.reduction: Reduction = reduction
        self.micro_batch = micro_batch
        self.rank = rank
        self.ranks = ranks
        self.num_workers = num_workers
        self.legacy_clip_router = legacy_clip_router
        self.truncated: set[int] = set()  # samples met so far whose end was cut off
        self.without_target: set[int] = set()  # samples met so far that teach nothing: their prompt alone fills them

    @property
    def remarks(self) -> list[str]:
        """What a person should know about the samples met so far."""
        if not self.truncated:
            return []
        cut, empty, total = len(self.truncated), len(self.without_target), len(self.dataset)
        return [
            f"{cut:,} of {total:,} samples were cut at the end to fit --dataset.max_seq_len; "
            f"{empty:,} of them have no target left"
        ]

    def packs(self, step: int) -> list[Pack]:
        """This rank's packs of one step.

        Raises:
            DataError: a row or its image cannot be read.
        """
        indices = self.order.indices(step)
        samples = [self.dataset.sample(index) for index in indices]
        self.truncated.update(i for i, sample in zip(indices, samples, strict=True) if sample.truncated)
        self.without_target.update(i for i, sample in zip(indices, samples, strict=True) if not sample.supervised)
        plan = plan_packs([len(sample.input_ids) for sample in samples], self.tokens_per_batch, self.ranks)
        mine = plan[self.rank :: self.ranks]
        weights = token_weights(samples, self.reduction, self.micro_batch)
        packs = []
        for number, members in enumerate(mine):
            routed_by, outside = None, list[int]()
            if self.legacy_clip_router:
                routed_by, outside = first_of_micro_batch(members, self.micro_batch)
            packs.append(
                collate(
                    [samples[i] for i in members],
                    [weights[i] for i in members],
                    [self._tile(samples[i], indices[i]) for i in members],
                    routed_by=routed_by,
                    outside=[self._tile(samples[i], indices[i]) for i in outside],
                    dummy_size=self.reader.size if self.ranks > 1 and number == len(mine) - 1 else 0,
                )
            )
        return packs

    def steps(self, first: int, end: int) -> Generator[list[Pack], None, None]:
        """The packs of steps first ... end - 1, in order; the next ones are prepared while one is in use. An error
        appears at its own step."""
        if self.num_workers == 0:
            yield from map(self.packs, range(first, end))
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="nibble-data")
        ahead: deque[Future[list[Pack]]] = deque()
        try:
            for step in range(first, end):
                ahead.append(pool.submit(self.packs, step))
                if len(ahead) > self.num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _tile(self, sample: Sample, index: int) -> Tensor | None:
        return self.reader.tile(sample.image, self.dataset.where(index)) if sample.image is not None else None
