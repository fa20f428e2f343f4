"""Variants on their inputs: built, checked against the fp32 reference, and wound up to be called in a mode.

Works on every device; what needs a GPU, the timing, is in benchmarks/measure.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Call, Inputs, Layout, Mode, Problem, Variant, normal, seeded

# Largest relative error, ||x - reference|| / ||reference||, of results and gradients computed in a dtype. 16-bit
# products accumulate one rounding of each operand and of the result; a wrong formula is off by far more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Wrong(Exception):
    """A variant's results are not the reference's."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One set of inputs and the gradients of the results. Sets are rotated so that no cache holds them."""

    inputs: Inputs
    differentiable: tuple[str, ...]
    gradients: tuple[Tensor | None, ...]  # None: one, for a scalar

    @property
    def leaves(self) -> list[Tensor]:
        return [self.inputs[name] for name in self.differentiable]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the set, those in lists too."""
        return [*flat(self.inputs.values()), *(g for g in self.gradients if g is not None)]

    def clone(self) -> Drawn:
        gradients = tuple(None if g is None else g.clone() for g in self.gradients)
        return as_leaves(replace(self, inputs={k: _clone(v) for k, v in self.inputs.items()}, gradients=gradients))

    def laid_out(self, layout: Layout) -> Drawn:
        packed = {name: layout.pack(self.inputs[name].detach()) for name in self.differentiable}
        gradients = tuple(None if g is None else layout.pack(g) for g in self.gradients)
        return as_leaves(replace(self, inputs=self.inputs | packed, gradients=gradients))


@dataclass(slots=True)
class Lane:
    """A variant that passed the check, on the sets that it is timed on."""

    variant: Variant
    call: Call
    drawn: list[Drawn]
    error: float | None


def draw(problem: Problem, count: int, device: torch.device) -> list[Drawn]:
    """`count` sets of random inputs, with random gradients for the results."""
    sets: list[Drawn] = []
    shapes: list[tuple[int, ...]] = []
    for seed in range(count):
        generator = seeded(device, seed)
        inputs = problem.draw(generator)
        if problem.differentiable and not shapes:
            with torch.no_grad():
                shapes = [tuple(result.shape) for result in problem.reference(inputs | _widened(problem, inputs))]
        gradients = tuple(normal(generator, *shape, dtype=problem.dtype) if shape else None for shape in shapes)
        sets.append(as_leaves(Drawn(inputs, problem.differentiable, gradients)))
    return sets


def expect(problem: Problem, drawn: Drawn) -> list[Tensor]:
    """Results and gradients of the reference, from fp32 activations."""
    wide = {name: x.requires_grad_() for name, x in _widened(problem, drawn.inputs).items()}
    results = problem.reference(drawn.inputs | wide)
    gradients = tuple(None if g is None else g.float() for g in drawn.gradients)
    return [*results, *differentiate(results, list(wide.values()), gradients)]


def _widened(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """What the reference gets in the place of the differentiable inputs."""
    return {name: inputs[name].detach().to(torch.float32, copy=True) for name in problem.differentiable}


def check(problem: Problem, variant: Variant, call: Call, drawn: Drawn, expected: Sequence[Tensor]) -> float:
    """The variant's relative error on one set, the largest over results and gradients.

    Raises Wrong where it is more than the dtype allows.
    """
    own = arrange(variant, drawn.clone())
    results = call(own.inputs)
    found = [*(x.detach().clone() for x in results), *differentiate(results, own.leaves, own.gradients)]
    if variant.layout is not None:
        found = [variant.layout.unpack(x) for x in found]
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise Wrong(f"shapes {[tuple(x.shape) for x in found]}, expected {[tuple(x.shape) for x in expected]}")
    error = max(relative_error(x, reference) for x, reference in zip(found, expected, strict=True))
    limit = TOLERANCE[problem.dtype] if problem.tolerance is None else problem.tolerance
    if not error <= limit:
        raise Wrong(f"relative error {error:.2g}, allowed {limit:.2g}")
    return error


def arrange(variant: Variant, drawn: Drawn) -> Drawn:
    """The set as this variant takes it."""
    if variant.layout is not None:
        drawn = drawn.laid_out(variant.layout)
    if variant.prepare is not None:
        drawn = replace(drawn, inputs=variant.prepare(drawn.inputs))
    return drawn


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; infinite where x is not finite."""
    size = reference.double().norm().item()
    error = (x.double() - reference.double()).norm().item() / (size or 1.0)
    return error if math.isfinite(error) else math.inf


def differentiate(
    results: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of the leaves; () where there are none."""
    if not leaves:
        return ()
    return torch.autograd.grad(list(results), list(leaves), list(gradients))


class Program:
    """A lane in a mode. `before` is untimed, `timed` calls the variant once on each set; what it returned is kept
    until the next time, so that results lie in different memory too."""

    def __init__(self, lane: Lane, mode: Mode, drawn: Sequence[Drawn]) -> None:
        self.lane = lane
        self.mode: Mode = "step" if lane.variant.floor else mode
        self.drawn = drawn
        self.results: list[tuple[Tensor, ...]] = []
        self.gradients: list[tuple[Tensor, ...]] = []

    def before(self) -> None:
        self.gradients = []
        self.results = [self.lane.call(s.inputs) for s in self.drawn] if self.mode == "backward" else []

    def timed(self) -> None:
        for i, s in enumerate(self.drawn):
            if self.mode != "backward":
                self.results.append(self.lane.call(s.inputs))
            if self.mode in ("backward", "full"):
                self.gradients.append(differentiate(self.results[i], s.leaves, s.gradients))

    def kept(self) -> list[Tensor]:
        """What the mode is for: gradients, or results."""
        if self.mode == "backward":
            return list(flat(self.gradients))
        return [*flat(self.results), *flat(self.gradients)]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def activation(x: Tensor) -> Tensor:
    """`x` as a step's result rather than a leaf, which autograd does not let an op overwrite; no kernel runs."""
    return _Activation.apply(x) if x.requires_grad else x  # type: ignore[no-untyped-call]


def as_leaves(drawn: Drawn) -> Drawn:
    for leaf in drawn.leaves:
        leaf.requires_grad_()
    return drawn


def flat(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among the values, lists and tuples opened."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_clone(item) for item in value] if isinstance(value, list) else value
