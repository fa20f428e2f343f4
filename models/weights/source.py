"""An opened model: its shape, its files, and its tensors under our names, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)  # slots would not let a generic alias be called
class Source(Generic[ConfigT]):
    """What opening a weight folder gives: names and shapes are checked, no weight has been read yet.

    A tensor that `fetch` returns has its file's dtype (fp16, bf16 or fp32) and may be a view of the mapped file: copy
    what is kept. Only tensors that are merged, re-ordered or added are allocated, and only one at a time.
    """

    config: ConfigT
    files: tuple[Path, ...]  # every file that was read, in a fixed order
    names: tuple[str, ...]  # names within the module (`layers.0.attention.q.weight`), in the order of the files
    fetch: Callable[[str], Tensor]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor); may be called again."""
        for name in self.names:
            yield name, self.fetch(name)


class LanguageSource(Source[LlamaConfig]):
    """An opened language model."""


class VisionSource(Source[ClipConfig]):
    """An opened vision tower."""
