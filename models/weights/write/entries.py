"""Tensors that will be written: known by name, shape and dtype before any of them is read, and read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.source import Source

NOT_QUANTIZED = (
    "export from the 16-bit model that it was quantized from: 16-bit weights made from 4 bits would look like the "
    "original and not be it"
)
TOO_LARGE = "write it as bfloat16, whose range is that of float32"


def _nothing() -> None:
    """Releases nothing: the tensor is in memory anyway."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `read` gives it in any floating dtype, or in `dtype` itself; it is cast when written."""

    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    release: Callable[[], None] = _nothing

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def value(self, name: str) -> Tensor:
        """The tensor as it is written.

        Raises:
            WeightsError: it is not of the shape that was announced, or is finite and would not be in `dtype`.
        """
        tensor = self.read()
        if tuple(tensor.shape) != self.shape:
            raise WeightsError(name, f"has the shape {tuple(tensor.shape)}; expected {self.shape}")
        if tensor.dtype == self.dtype:
            return tensor
        cast = tensor.to(self.dtype)
        if self.dtype == torch.float16 and not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                name, f"has values up to {tensor.abs().max():.4g}, more than float16 holds", do=TOO_LARGE
            )
        return cast


Entries = Mapping[str, Entry]  # by the file's names, in the file's order


def size_of(entries: Entries) -> int:
    """Bytes that the weights take on the disk."""
    return sum(entry.bytes for entry in entries.values())


def tensor_entries(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Entry]:
    """Entries of tensors in memory, in `dtype` (None: each in its own)."""
    return {name: _entry_of(tensor, dtype or tensor.dtype) for name, tensor in tensors.items()}


def source_entries(source: Source[Any], shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Entry]:
    """Entries of an opened model under our names, in `dtype`. `shapes` are those of its module. A weight that its file
    holds quantized is a WeightsError when it is read."""
    return {name: _entry_from(source, name, tuple(shapes[name]), dtype) for name in source.names}


def renamed(entries: Entries, name_of: Callable[[str], str]) -> dict[str, Entry]:
    """`entries` under other names.

    Raises:
        ValueError: two of them get one name.
    """
    out = {name_of(name): entry for name, entry in entries.items()}
    if len(out) != len(entries):
        raise ValueError(f"{len(entries)} tensors get {len(out)} names")
    return out


def changed(entry: Entry, change: Callable[[Tensor], Tensor], shape: Shape | None = None) -> Entry:
    """`entry` with `change` applied to the tensor after it is read. `shape`: what it then has, if another."""
    read = entry.read
    return replace(entry, read=lambda: change(read()), shape=entry.shape if shape is None else shape)


def _entry_of(tensor: Tensor, dtype: torch.dtype) -> Entry:
    return Entry(tuple(tensor.shape), dtype, tensor.detach)


def _entry_from(source: Source[Any], name: str, shape: Shape, dtype: torch.dtype) -> Entry:
    def read() -> Tensor:
        tensor = source.fetch(name)
        if not isinstance(tensor, Tensor):
            raise WeightsError(source.files[0].parent, f"{name} is quantized in its file", do=NOT_QUANTIZED)
        return tensor

    return Entry(shape, dtype, read, lambda: source.release(name))
