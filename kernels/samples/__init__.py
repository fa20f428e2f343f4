"""Calls of every primitive at sizes of choice: what is compiled without a GPU, counted, and checked for its manners.

kernels/samples/<op>.py has `calls(draw, tokens, width)`, one `Call` or more for each primitive of kernels/<op>.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import PRIMITIVES, Primitive


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a primitive."""

    primitive: str  # its name
    arguments: tuple[object, ...]
    about: str = ""  # tells it from other calls of the same primitive: "LayerNorm"

    @property
    def label(self) -> str:
        return f"{self.primitive}, {self.about}" if self.about else self.primitive

    @property
    def registered(self) -> Primitive:
        return PRIMITIVES[self.primitive]


@dataclass(frozen=True, slots=True)
class Draw:
    """Makes the tensors of a call, activations in `dtype`. On the meta device they have no data.

    With a generator, one of the CPU, the numbers are the same on every device.
    """

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None = None

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal."""
        drawn = torch.randn(shape, generator=self.generator, device=self._source)
        return drawn.to(self.device, dtype or self.dtype)

    def fp32(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)

    def below(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers from 0 to high - 1."""
        return torch.randint(high, shape, generator=self.generator, device=self._source).to(self.device, dtype)

    @property
    def _source(self) -> torch.device | str:
        return "cpu" if self.generator else self.device


def ops() -> list[str]:
    """Names of the op files that launch kernels."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def calls(op: str, draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    """The calls of kernels/<op>.py's primitives for `tokens` tokens of `width` channels."""
    yield from importlib.import_module(f"{__name__}.{op}").calls(draw, tokens, width)
