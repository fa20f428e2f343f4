"""One layout of a vision tower's file, and how a tower is read from it with every tensor accounted for.

A file holds more than the tower that runs: blocks behind the selected layer, last norms, pooling heads ("unused": they
belong to the tower, and exports copy them), and often a whole text model ("foreign"). Anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from models.quantized import Packed
from models.vision.tower import TowerConfig, make_tower
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.names import Names, Part, check_shapes, shapes_of
from models.weights.prequantized import take
from models.weights.source import VisionSource
from models.weights.view import Weights

BLOCK = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a kind of file names a tower's tensors. Patterns match names without `prefix`, which begins all but foreign
    ones."""

    names: Names
    leaves: Mapping[str, str] = field(default_factory=dict)  # our whole name within a layer -> theirs, where irregular
    unused: Mapping[str, str]  # pattern of what belongs to the tower and is never run -> its name in an export (re.sub)
    foreign: str = r"(?!)"  # pattern of what is another model's
    leading: Mapping[str, Shape] = field(default_factory=dict)  # our name -> axes of size 1 that theirs begins with
    prefix: str = ""

    def of(self, name: str) -> str:
        """The file's name of the tensor that holds ours."""
        if self.leaves and (block := BLOCK.match(name)) and (leaf := self.leaves.get(name[block.end() :])):
            return f"{self.prefix}{self.names.layer.format(block[1])}{leaf}"
        return self.prefix + self.names.of(name)

    def part(self, name: str) -> Part | None:
        return self.names.part(name)

    def expected(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The file's names and shapes for ours."""
        expected = {}
        for name, shape in shapes.items():
            part = self.part(name)
            expected[self.of(name)] = self.leading.get(name, ()) + (part.whole(shape) if part else shape)
        return expected

    def exported(self, name: str) -> str | None:
        """The name in an export of what the tower never runs; None where `name` is something else."""
        if not name.startswith(self.prefix):
            return None
        name = name.removeprefix(self.prefix)
        for pattern, theirs in self.unused.items():
            if match := re.fullmatch(pattern, name):
                return match.expand(theirs)
        return None

    def is_foreign(self, name: str) -> bool:
        return re.fullmatch(self.foreign, name) is not None


def tower_shapes(config: TowerConfig) -> dict[str, Shape]:
    """Every tensor of `make_tower(config)` by its name within the module."""
    with torch.device("meta"):
        return shapes_of(make_tower(config))


def open_layout(
    where: Path, tensors: Weights, config: TowerConfig, layout: Layout, export: Layout, files: tuple[Path, ...]
) -> VisionSource:
    """The tower of `config` in `tensors`. Blocks that `config` does not run may be there or not, but whole; `export` is
    the layout under whose names the unused ones are given to exports.

    Raises:
        WeightsError: tensors are missing, unknown or of another shape (all listed by the file's names).
    """
    run = tower_shapes(config)
    whole = tower_shapes(replace(config, select_feature="patch", select_layer=-1))
    found = {name: shape for name, shape in tensors.shapes.items() if not layout.is_foreign(name)}
    behind = [name for name in whole if name not in run and _is_begun(name, layout, found)]
    loose = {name: theirs for name in found if (theirs := layout.exported(name)) is not None}
    expected = layout.expected(run | {name: whole[name] for name in behind})
    check_shapes(where, {name: shape for name, shape in found.items() if name not in loose}, expected)
    named = _Named(where, tensors, layout)
    order = {name: i for i, name in enumerate(found)}
    source = VisionSource(
        config=config, files=files, names=tuple(sorted(run, key=lambda name: order[layout.of(name)])),
        sizes={name: named.size(name) for name in run}, fetch=named.fetch, release=named.release, close=tensors.close,
        allocated=lambda name: False, unused=lambda: named.unused({name: export.of(name) for name in behind}, loose),
    )  # fmt: skip
    source.close()  # what cannot be mapped is not in memory while the language model is read
    return source


@dataclass(frozen=True, slots=True)
class _Named:
    """A file's tensors by our names."""

    where: Path
    tensors: Weights
    layout: Layout

    def size(self, name: str) -> int:
        part = self.layout.part(name)
        return self.tensors.sizes[self.layout.of(name)] // (1 if part is None else part.count)

    def fetch(self, name: str) -> Tensor | Packed:
        theirs = self.layout.of(name)
        weight = self.tensors.fetch(theirs)
        if isinstance(weight, Tensor):
            weight = weight.flatten(0, len(self.layout.leading.get(name, ())))
        return take(weight, self.layout.part(name), theirs, self.where)

    def release(self, name: str) -> None:
        self.tensors.release(self.layout.of(name))

    def unused(self, behind: Mapping[str, str], loose: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """What the tower does not run, one tensor at a time. `behind`: our names of blocks -> those in an export;
        `loose`: the file's names of everything else -> the same."""
        try:
            for name, exported in behind.items():
                yield exported, self._unquantized(self.layout.of(name), self.fetch(name))
                self.release(name)
            for theirs, exported in loose.items():
                yield exported, self._unquantized(theirs, self.tensors.fetch(theirs))
                self.tensors.release(theirs)
        finally:
            self.tensors.close()

    def _unquantized(self, theirs: str, weight: Tensor | Packed) -> Tensor:
        if isinstance(weight, Tensor):
            return weight
        raise WeightsError(self.where, f"{theirs} is quantized in its file", do="export from the tower in 16 bits")


def _is_begun(name: str, layout: Layout, found: Mapping[str, Shape]) -> bool:
    """Whether the file holds something of the block of `name`: then it must hold it all."""
    block = BLOCK.match(name)
    if block is None:
        return False
    start = layout.prefix + layout.names.layer.format(block[1])
    return any(theirs.startswith(start) for theirs in found)


def count_blocks(names: Mapping[str, Shape], layout: Layout) -> int:
    """How many blocks a file has, for layouts without settings."""
    pattern = re.compile(re.escape(layout.prefix + layout.names.layer).replace(r"\{\}", r"(\d+)"))
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)
