"""Writes a model as Hugging Face's loaders expect it: safetensors shards of at most 5 GB with an index, or one file.

    model-00001-of-00003.safetensors ...  metadata {"format": "pt"}
    model.safetensors.index.json          {"metadata": {"total_size": bytes}, "weight_map": {name: shard}}

One tensor at a time is in memory. Who calls gives the files their folder, and the folder its name when all is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.weights.archive import Shape
from models.weights.write.entries import Entries, size_of

LARGEST_SHARD = 5_000_000_000  # bytes, transformers' and LLaVA's choice
STEM = "model"
METADATA = {"format": "pt"}  # transformers refuses a file that does not say it

Specs = Mapping[str, tuple[torch.dtype, Shape]]


class Writer(Protocol):
    """A new safetensors file whose tensors were announced; engine.tensor_file.TensorWriter is one."""

    def write(self, name: str, tensor: Tensor) -> int: ...
    def finish(self) -> int: ...
    def close(self) -> None: ...


class Create(Protocol):
    """Begins a file of tensors known by dtype and shape."""

    def __call__(self, path: Path, specs: Specs, metadata: Mapping[str, str]) -> Writer: ...


def write_shards(
    folder: Path, entries: Entries, create: Create, *, largest: int = LARGEST_SHARD,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Path]:  # fmt: skip
    """Writes every entry into `folder`, each shard synced to disk, and the index where there is more than one.

    A tensor larger than `largest` bytes has a shard of its own. `progress` is told each tensor before it is read.
    Returns the files.
    """
    shards = plan_shards(entries, largest)
    files = [folder / shard_name(number, len(shards)) for number in range(len(shards))]
    for path, names in zip(files, shards, strict=True):
        _write(path, {name: entries[name] for name in names}, create, progress)
    if len(shards) > 1:
        weight_map = {name: path.name for path, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": size_of(entries)}, "weight_map": dict(sorted(weight_map.items()))}
        files.append(folder / f"{STEM}.safetensors.index.json")
        files[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def plan_shards(entries: Entries, largest: int) -> list[list[str]]:
    """The names of each shard, in order: a shard is full when the next tensor would take it above `largest` bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, entry in entries.items():
        if shards[-1] and held + entry.bytes > largest:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += entry.bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """The file of shard `number` (from 0) of `count`."""
    return f"{STEM}.safetensors" if count == 1 else f"{STEM}-{number + 1:05d}-of-{count:05d}.safetensors"


def _write(path: Path, entries: Entries, create: Create, progress: Callable[[str], None]) -> None:
    writer = create(path, {name: (entry.dtype, entry.shape) for name, entry in entries.items()}, METADATA)
    try:
        for name, entry in entries.items():
            progress(name)
            writer.write(name, entry.value(name))
            entry.release()  # the pages of a mapped file
        writer.finish()
    finally:
        writer.close()
