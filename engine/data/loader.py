"""The packs of each step for one rank, prepared ahead by threads. Any number of threads gives the same packs.

A thread reads the rows of a step, tokenises them, decodes and resizes their images, collates and, for a GPU, puts the
packs into pinned memory. From there they are copied on the stream of the step itself, each just before its pass
(engine/graphs.py): a pack of 2,048 tokens with four tiles is 2.5 MB, 0.1 ms of a pass of tens of milliseconds, the host
does not wait, and neither a second stream nor a second set of buffers on the device is needed.

Threads are enough. Measured on ScienceQA-like rows (450 tokens, half with a picture of some 500 x 375 pixels), two
cores shared with other work: 340 samples/s with one thread, 580 with two; Pillow, which takes most of the time (200
pictures/s), lets go of the interpreter. What holds it, tokenising, planning and collating, makes 2,300 samples/s. A
card that trains 80 samples/s needs a quarter of a core, and the interpreter for 3 % of the time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Protocol

from torch import Tensor

from engine.data.images import TileReader
from engine.data.packing import LAVIN, PackForm, Reduction, collate, first_of_micro_batch, token_weights
from engine.data.padding import pad
from engine.data.planning import plan_packs
from engine.data.sample import Dataset, Sample
from models.pack import Pack


class StepOrder(Protocol):
    """What the loader needs of a sampler."""

    def indices(self, step: int) -> Sequence[int]:
        """The samples of a step, of all ranks together."""
        ...


class ImagePlaces(Protocol):
    """What the loader needs of a table of features (engine/tower_cache.py)."""

    def clear(self) -> None:
        """No image has been seen."""
        ...

    def place(self, path: str) -> tuple[int | None, bool]:
        """-> (the image's row, None where there is no room, whether its tile is wanted)."""
        ...

    def spare(self, number: int) -> int:
        """The row of a pack's image `number` of those that have no room."""
        ...


class StepLoader:
    """Packs of `rank` out of `ranks`. Every rank has the same number of packs in a step, and where there are several
    ranks the last pack of each has a tile (of zeros and without image slots where need be): every trained parameter
    then takes part in the one backward pass whose gradients DDP exchanges.

    Args:
        micro_batch: samples of the micro-batch of the recipe, for the `micro_batch` reduction and LaVIN's CLIP router.
        legacy_clip_router: the first sample of each micro-batch routes all its tiles in the tower's adapters.
        num_workers: threads, each preparing a whole step; 0 prepares a step when it is asked for.
        few_shapes: packs are filled up to one of few shapes, for CUDA graphs.
        pinned: packs lie in pinned memory, for copies to a GPU.
        places: of images whose features are kept, where the tower is frozen: only images that it has not seen come as
            tiles.
        form: of the packs that the model expects.
    """

    def __init__(
        self, dataset: Dataset, order: StepOrder, reader: TileReader, *, tokens_per_batch: int, reduction: Reduction,
        micro_batch: int, rank: int = 0, ranks: int = 1, num_workers: int = 0, legacy_clip_router: bool = False,
        few_shapes: bool = False, pinned: bool = False, places: ImagePlaces | None = None, form: PackForm = LAVIN,
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
        self.legacy_clip_router = legacy_clip_router and places is None
        self.few_shapes = few_shapes
        self.pinned = pinned
        self.places = places
        self.form = form
        self._turns: _Turns | None = None  # of steps that are prepared at once
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
        samples: list[Sample] = []
        mine: list[list[int]] = []
        try:
            indices = self.order.indices(step)
            samples += [self.dataset.sample(index) for index in indices]
            plan = plan_packs(
                [len(sample.input_ids) for sample in samples], self.tokens_per_batch, self.ranks,
                tiles=[sample.tiles for sample in samples], modality=self.form.modality,
            )  # fmt: skip
            mine += plan[self.rank :: self.ranks]
        finally:  # a step that cannot be read takes its turn, too: others wait for it
            placed = self._place(step, [samples[i] for members in mine for i in members])
        self.truncated.update(i for i, sample in zip(indices, samples, strict=True) if sample.truncated)
        self.without_target.update(i for i, sample in zip(indices, samples, strict=True) if not sample.supervised)
        weights = token_weights(samples, self.reduction, self.micro_batch)
        packs = []
        for number, members in enumerate(mine):
            routed_by, outside = None, list[int]()
            if self.legacy_clip_router:
                routed_by, outside = first_of_micro_batch(members, self.micro_batch)
            places = None if placed is None else [next(placed) for _ in members]
            wanted = [True for _ in members] if places is None else [new for _, new in places]
            pack = collate(
                [samples[i] for i in members],
                [weights[i] for i in members],
                [self._tile(samples[i], indices[i]) if new else None for i, new in zip(members, wanted, strict=True)],
                routed_by=routed_by,
                outside=[self._tile(samples[i], indices[i]) for i in outside],
                dummy_size=self.reader.size if self.ranks > 1 and number == len(mine) - 1 else 0,
                table_rows=None if places is None else self._rows([row for row, _ in places]),
                form=self.form,
            )
            pack = pad(pack, self.form.tile_tokens) if self.few_shapes else pack
            packs.append(pack.pin_memory() if self.pinned else pack)
        return packs

    def _place(self, step: int, samples: Sequence[Sample]) -> Iterator[tuple[int | None, bool]] | None:
        """Row and need of a tile of each sample's image; (0, False) where it has none. The samples are those that this
        rank's tower will see, in that order: an image is new where it comes first, on each rank."""
        if self.places is None:
            return None
        with self._turns.of(step) if self._turns is not None else nullcontext():
            return iter([(0, False) if s.image is None else self.places.place(s.image) for s in samples])

    def _rows(self, placed: Sequence[int | None]) -> list[int]:
        """The rows of a pack, with spare ones for the images that have none."""
        assert self.places is not None
        rows, spares = list[int](), 0
        for row in placed:
            rows.append(self.places.spare(spares) if row is None else row)
            spares += row is None
        return rows

    def steps(self, first: int, end: int) -> Generator[list[Pack], None, None]:
        """The packs of steps first ... end - 1, in order; the next ones are prepared while one is in use. An error
        appears at its own step."""
        if self.places is not None:
            self.places.clear()
        self._turns = _Turns(first)
        try:
            yield from self._ahead(first, end) if self.num_workers else map(self.packs, range(first, end))
        finally:
            self._turns = None

    def _ahead(self, first: int, end: int) -> Iterator[list[Pack]]:
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


class _Turns:
    """Threads do something in the order of their steps, however fast they are."""

    def __init__(self, first: int) -> None:
        self.next = first
        self.changed = threading.Condition()

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """The inside of it runs after those of all earlier steps."""
        with self.changed:
            self.changed.wait_for(lambda: self.next == step)
            try:
                yield
            finally:
                self.next = step + 1
                self.changed.notify_all()
