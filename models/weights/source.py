"""An opened model: its shape, its files, and its tensors under our names, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from models.language.config import DecoderConfig
from models.quantized import Packed
from models.vision.config import TowerConfig

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)  # slots would not let a generic alias be called
class Source(Generic[ConfigT]):
    """What opening a weight folder gives: names and shapes are checked, no weight has been read yet.

    A tensor that `fetch` returns has its file's dtype (fp16, bf16 or fp32) and may be a view of the mapped file: copy
    what is kept. Only tensors that are merged, re-ordered or added are allocated, and only one at a time. A linear's
    weight that its file holds quantized comes so.

    `release` lets go of the mapped pages of one tensor, `close` of every file; `fetch` brings either back.
    """

    config: ConfigT
    files: tuple[Path, ...]  # every file that was read, in a fixed order
    names: tuple[str, ...]  # names within the module (`layers.0.attention.q.weight`), in the order of the files
    sizes: Mapping[str, int]  # bytes that are read for each name
    fetch: Callable[[str], Tensor | Packed]
    release: Callable[[str], None]
    close: Callable[[], None]
    allocated: Callable[[str], bool]  # whether the tensor that `fetch` returns is nobody else's, so may be written to

    def stream(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every (name, tensor); may be called again. Who drops each tensor before it asks for the next holds one."""
        try:
            for name in self.names:
                yield name, self.fetch(name)
                self.release(name)
        finally:
            self.close()


class LanguageSource(Source[DecoderConfig]):
    """An opened language model."""


@dataclass(frozen=True, kw_only=True)
class VisionSource(Source[TowerConfig]):
    """An opened vision tower. `unused` gives what belongs to it and is never run (last blocks and norm, pooling head),
    under the names of its own project, for exports."""

    unused: Callable[[], Iterator[tuple[str, Tensor]]]
