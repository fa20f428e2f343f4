"""One example as tokens, and what a data set is to the rest of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

IGNORE = -100  # label of a token that is not a target
NEWLINE = -1  # in image_rows: the learned embedding that ends a row of patches


@dataclass(slots=True)
class Sample:
    """Tokens of one example, without LaVIN's modality token (a pack has its own two of them)."""

    id: str
    input_ids: list[int]  # 0 at image slots
    labels: list[int]  # labels[j] is token j itself or IGNORE; packing shifts
    image: str | None  # absolute path
    image_slots: list[int]  # positions inside input_ids
    truncated: bool  # tokens were cut off to fit
    num_tiles: int = 1  # of its image, where it has one
    image_rows: list[int] | None = None  # of each slot, the row of its embedding among those of its tiles, or NEWLINE;
    # None: the tiles' embeddings in order

    @property
    def tiles(self) -> int:
        """How many tiles the tower sees of it."""
        return self.num_tiles if self.image is not None else 0

    @property
    def supervised(self) -> list[int]:
        """Positions of the tokens that are targets."""
        return [j for j, label in enumerate(self.labels) if label != IGNORE]


class Dataset(Protocol):
    """Samples by index. Reading one costs a tokenisation; its image is not opened."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """The sample of this index, laid out for training."""
        ...

    def where(self, index: int) -> str:
        """File and entry of this index, for error messages."""
        ...
