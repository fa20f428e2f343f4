"""Which layers keep what for their backward pass: the least recomputation whose peak memory is within a budget.

A forward pass adds up what layers keep, a backward pass takes it away again, so while layer l works, forward or
backward, what is alive is what the layers before it keep, and its own peak:

    peak = max( max over l of (saved of all layers before l + peak_l),  saved of all layers + after )

Two things are known more exactly than that. Forward, what the layer before handed on is alive besides, and that depends
on what the layer before keeps. And the last layer of a stage may need more than one with another behind it.

Layers of a stage are alike, so an assignment is, up to order, how many of them have each policy. For given numbers the
best order is by falling peak - saved: of two neighbours a, b with peak_a - saved_a >= peak_b - saved_b, on S bytes, a
first needs at most

    max(S + peak_a, S + saved_a + peak_b) <= S + saved_b + peak_a,

since saved_b >= 0 and saved_a + peak_b <= saved_b + peak_a by the choice of a; and b first needs S + saved_b + peak_a
at least. What stands before and behind the two sees the same sum, and seconds do not depend on the order; so neighbours
are exchanged until the order falls, and the peak never grew. All numbers of each policy are tried: 861 for 40 layers.
So the choice is the best one, exactly, where a backward pass needs most and the last layer needs more than others by
the same under each policy. Elsewhere its peak is still exact, and another order may save what these differ by.

Stages are joined from the last to the first: the whole needs max(peak of the stage, its saved + what the rest needs),
which never falls when the rest needs more, and seconds add up. So of the assignments of the rest only those matter that
no other one beats in both (the Pareto front), and for each stage every one of its own meets every one of these. Seconds
are added up as whole picoseconds, so that what is equal is equal on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.recompute import POLICIES, Policy

Integers: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = Integers


@dataclass(frozen=True, slots=True)
class Choice:
    """One layer under one policy. Bytes beyond what was alive before it."""

    saved: int  # alive after its forward until its backward
    peak: int  # most at once, in its backward (recomputation, gradients and `saved` included) or behind its stage
    seconds: float  # of recomputation in the backward pass
    inner: int | None = None  # `peak` of a layer that is not the last of its stage; None: the same
    handed: int = 0  # alive when the next layer starts, beyond what layers keep
    forward: int = 0  # most in its forward, beyond what layers keep and what it was handed


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers that are alike."""

    count: int
    choices: Mapping[Policy, Choice]  # at least one
    handed: int = 0  # alive when the first of them starts, beyond what layers keep

    def peak(self, policies: Sequence[Policy]) -> int:
        """The most at once under these policies, one a layer, beyond what was alive before the stage."""
        highest, saved, handed = 0, 0, self.handed
        for number, policy in enumerate(policies, start=1):
            choice = self.choices[policy]
            most = choice.peak if number == len(policies) or choice.inner is None else choice.inner
            highest = max(highest, saved + most, saved + handed + choice.forward)
            saved, handed = saved + choice.saved, choice.handed
        return highest

    def saved(self, policies: Sequence[Policy]) -> int:
        """What layers under these policies keep."""
        return sum(self.choices[policy].saved for policy in policies)


@dataclass(frozen=True, slots=True)
class Solution:
    """What is best for a budget."""

    policies: tuple[tuple[Policy, ...], ...]  # of each of the stages, in forward order
    peak: int  # bytes
    seconds: float  # of recomputation in the backward pass
    fits: bool  # peak <= budget


@dataclass(frozen=True, slots=True)
class _Stage:
    """Every way to give policies to the layers of a stage, in a fixed order. n ways, c policies."""

    order: tuple[Policy, ...]  # [c], by falling peak - saved: that of the layers
    counts: NDArray[np.int64]  # [n, c]
    saved: Bytes  # [n]
    peak: Bytes  # [n], beyond what is alive before the stage
    time: Integers  # [n], picoseconds

    def policies(self, way: int) -> tuple[Policy, ...]:
        counts = self.counts[way].tolist()
        return tuple(policy for policy, count in zip(self.order, counts, strict=True) for _ in range(count))


@dataclass(frozen=True, slots=True)
class _Front:
    """Assignments of the stages from one to the last that no other one beats in need and in seconds. m of them."""

    need: Bytes  # [m], falling: beyond what is alive before these stages
    time: Integers  # [m], rising: picoseconds
    ways: NDArray[np.int64]  # [m, stages]


def solve(stages: Sequence[Layers], after: int, budget: int) -> Solution:
    """The assignment of least recomputation whose peak is at most `budget` bytes; among these that of the least peak,
    and then the first in a fixed order. Where nothing fits: that of the least peak.

    Args:
        stages: in forward order.
        after: bytes of what follows the last layer (head and loss), forward and backward, beyond what layers keep.
    """
    ways = [_ways(stage) for stage in stages]
    front = _Front(np.array([after]), np.zeros(1, np.int64), np.zeros((1, 0), np.int64))
    for stage in reversed(ways):
        front = _before(stage, front)
    fitting = np.flatnonzero(front.need <= budget)
    best = int(fitting[0]) if fitting.size else len(front.need) - 1
    chosen = zip(ways, front.ways[best].tolist(), strict=True)
    return Solution(
        policies=tuple(stage.policies(way) for stage, way in chosen),
        peak=int(front.need[best]), seconds=int(front.time[best]) / 1e12, fits=bool(fitting.size),
    )  # fmt: skip


def _ways(layers: Layers) -> _Stage:
    known = [policy for policy in POLICIES if policy in layers.choices]
    inner = {p: c.peak if c.inner is None else c.inner for p, c in layers.choices.items()}
    order = tuple(sorted(known, key=lambda p: layers.choices[p].saved - inner[p]))
    counts = np.array(list(_numbers(layers.count, len(order))), np.int64).reshape(-1, len(order))
    most_kept = [-counts[:, order.index(policy)] for policy in reversed(known)]
    counts = counts[np.lexsort(most_kept)]  # of ways that are as good, the one that keeps most in most layers
    saved, peak = np.zeros((2, len(counts)), np.int64)
    handed, left = np.full(len(counts), layers.handed), counts.sum(axis=1)
    for policy, column in zip(order, counts.T, strict=True):
        choice, left = layers.choices[policy], left - column
        first, last = saved + handed, saved + (column - 1) * choice.saved
        forward = np.maximum(first, np.where(column > 1, last + choice.handed, 0)) + choice.forward
        ends = left == 0  # the last of the stage is among these
        backward = np.where(ends, last + choice.peak, last + inner[policy])
        backward = np.maximum(backward, np.where(ends & (column > 1), last - choice.saved + inner[policy], 0))
        peak = np.where(column > 0, np.maximum(peak, np.maximum(forward, backward)), peak)
        saved, handed = saved + column * choice.saved, np.where(column > 0, choice.handed, handed)
    return _Stage(order, counts, saved, peak, counts @ np.array([_picoseconds(layers.choices[p]) for p in order]))


def _picoseconds(choice: Choice) -> int:
    return round(1e12 * choice.seconds)


def _numbers(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write `total` as a sum of `parts` numbers."""
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _numbers(total - first, parts - 1)]


def _before(stage: _Stage, rest: _Front) -> _Front:
    """`rest` with a stage before it."""
    need = np.maximum(stage.peak[:, None], stage.saved[:, None] + rest.need)  # [n, m]
    time = stage.time[:, None] + rest.time
    order = np.lexsort((need.ravel(), time.ravel()))  # by time, then need, then place
    falling = np.minimum.accumulate(need.ravel()[order])
    kept = order[np.flatnonzero(np.diff(falling, prepend=np.iinfo(np.int64).max) < 0)]
    own, others = np.unravel_index(kept, need.shape)
    ways = np.concatenate((own[:, None], rest.ways[others]), axis=1)
    return _Front(need.ravel()[kept], time.ravel()[kept], ways)
