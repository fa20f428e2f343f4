"""What a benchmark consists of. A case is a shape; on a device it becomes a problem: inputs, a reference, variants.

    Bench      cases() needs no GPU; problem(case, device) draws tensors and names the variants
    Variant    one implementation: `build` imports and compiles it, what it returns is called and timed
    Yardstick  a benchmark of whole optimiser steps, which makes its rows itself

A variant is a function of the inputs to a tuple of results; its backward is autograd's, for random gradients of the
results that are the same for all variants. Every variant is checked against the fp32 reference before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.rows import Origin, Row, case_name

Mode = Literal["forward", "backward", "full", "step"]  # full: forward and backward; step: what has no backward to it
Inputs = dict[str, Any]
Call = Callable[[Inputs], tuple[Tensor, ...]]

TRAINING: tuple[Mode, ...] = ("forward", "backward", "full")


@dataclass(frozen=True, slots=True)
class Case:
    """A shape to be measured. `quick`: part of --quick, as all cases are that a goal looks at."""

    bench: str
    shape: Mapping[str, Any]
    modes: tuple[Mode, ...] = TRAINING
    quick: bool = True

    @property
    def name(self) -> str:
        return case_name(self.shape)


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that a mode needs: bytes to and from device memory, or floating-point operations; never both."""

    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How a variant wants the activations: applied to differentiable inputs, results and their gradients, untimed."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation. Ours are called nibble or nibble_*; the others are peers, at their best settings."""

    name: str
    build: Callable[[], Call]  # what it raises is reported in the variant's place
    package: str | None = None  # distribution of a peer
    layout: Layout | None = None
    prepare: Callable[[Inputs], Inputs] | None = None  # untimed: other views of the inputs, optimizers
    floor: bool = False  # a bound, not an implementation: called as it is in every mode, not checked
    quick: bool = True  # timed under --quick too

    @property
    def is_ours(self) -> bool:
        return self.name.partition("_")[0] == "nibble"


@dataclass(frozen=True, slots=True)
class Problem:
    """One case on a device."""

    draw: Callable[[torch.Generator], Inputs]  # fresh tensors, and frozen ones that are the same every time
    differentiable: tuple[str, ...]  # inputs that get a gradient
    reference: Call  # plain torch; gets the differentiable inputs in fp32
    variants: tuple[Variant, ...]
    cost: Mapping[Mode, Cost]
    dtype: torch.dtype = torch.bfloat16
    tolerance: float | None = None  # of the relative error; None: what the dtype allows


@dataclass(frozen=True, slots=True)
class Bench:
    """One module of benchmarks/."""

    name: str
    about: str
    cases: Callable[[], list[Case]]
    problem: Callable[[Case, torch.device], Problem]
    tiny: Mapping[str, Any]  # sizes at which a CPU can run any case: replaces entries of a case's shape


@dataclass(frozen=True, slots=True)
class Yardstick:
    """One module of benchmarks/ that measures whole steps: its cases make their rows themselves, in mode "step"."""

    name: str
    about: str
    cases: Callable[[], list[Case]]
    variants: Callable[[Case], tuple[str, ...]]  # under --quick too
    rows: Callable[[Case, torch.device, Origin, bool], Iterator[Row]]  # the flag: --quick
    tiny: Mapping[str, Any]


def seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random normal numbers on the generator's device: zeros would be faster than real data."""
    return torch.randn(shape, generator=generator, device=generator.device).mul_(scale).to(dtype)


def passes(forward: int, backward: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> dict[Mode, Cost]:
    """The cost of an op whose traffic is so many passes over a tensor of this shape, each way."""
    once = math.prod(shape) * dtype.itemsize
    counts: dict[Mode, int] = {"forward": forward, "backward": backward, "full": forward + backward}
    return {mode: Cost(bytes=count * once) for mode, count in counts.items()}


def products(forward: float, backward: float) -> dict[Mode, Cost]:
    """The cost of an op that is bound by its matrix products, in floating-point operations."""
    counts: dict[Mode, float] = {"forward": forward, "backward": backward, "full": forward + backward}
    return {mode: Cost(flops=round(count)) for mode, count in counts.items()}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best for fixed shapes. Breaks in the graph are errors, not slow code."""
    return torch.compile(function, dynamic=False, fullgraph=True)
