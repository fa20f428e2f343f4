"""Our tensor names, their shapes, and how another project's names correspond to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.adapters.names import is_adapter
from models.language.decoder import Decoder, DecoderConfig
from models.weights.errors import WeightsError

if TYPE_CHECKING:  # benchmarks fill models where safetensors, which reads archives, is not installed
    from models.weights.archive import Shape


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of another project's tensor are ours, where it holds several of ours of one shape."""

    index: int
    count: int = 3
    head_dim: int | None = None  # the parts take turns, head by head; None: one part lies under another

    def take(self, whole: Tensor) -> Tensor:
        """Our rows [R, ...] of [count * R, ...]: a view, or with turns a copy."""
        if self.head_dim is None:
            return whole.chunk(self.count)[self.index]
        return whole.unflatten(0, (-1, self.count, self.head_dim))[:, self.index].flatten(0, 1)

    def whole(self, shape: Shape) -> Shape:
        """The shape of the tensor that holds ours."""
        return (self.count * shape[0], *shape[1:])


@dataclass(frozen=True, slots=True)
class Names:
    """Another project's name for each of ours. In a layer it is `layer`, the module's name, and .weight or .bias."""

    outside: Mapping[str, str]  # whole names outside the layers
    layer: str  # prefix with the layer's number as {}
    modules: Mapping[str, str]  # our module within a layer -> theirs
    parts: Mapping[str, Part] = field(default_factory=dict)  # our modules that are rows of theirs

    def of(self, name: str) -> str:
        if name in self.outside:
            return self.outside[name]
        _, index, rest = name.split(".", 2)
        module, _, leaf = rest.rpartition(".")
        return f"{self.layer.format(index)}{self.modules[module]}.{leaf}"

    def part(self, name: str) -> Part | None:
        """Which rows of `of(name)` are meant; None: all."""
        if name in self.outside:
            return None
        return self.parts.get(name.split(".", 2)[2].rpartition(".")[0])

    def expected(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Their names and shapes for ours."""
        parts = {name: self.part(name) for name in shapes}
        return {self.of(name): part.whole(shapes[name]) if part else shapes[name] for name, part in parts.items()}


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Every tensor that files hold for `module` (built on the meta device), by its name within it: no adapters."""
    return {name: tuple(p.shape) for name, p in module.named_parameters() if not is_adapter(name)}


def language_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Every tensor of a language model by its name within the module."""
    with torch.device("meta"):
        return shapes_of(Decoder(config))


def check_shapes(file: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], do: str = "") -> None:
    """Raises a WeightsError that lists every difference between the tensors `found` in `file` and those `expected`."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    mismatched = [
        f"{name}: got {_text(found[name])}, expected {_text(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if missing or extra or mismatched:
        raise WeightsError(file, missing=missing, extra=extra, mismatched=mismatched, do=do)


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
