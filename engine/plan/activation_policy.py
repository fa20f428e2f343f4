"""Which layers keep what for their backward pass: the least recomputation whose peak memory is within a budget.

A forward pass adds up what layers keep, a backward pass takes it away again, so while layer l works, forward or
backward, what is alive is what the layers before it keep, and its own peak:

    peak = max( max over l of (saved of all layers before l + peak_l),  saved of all layers + after )

Exact. Layers of a stage are alike, so an assignment is, up to order, how many of them have each policy. For given
numbers the best order is by falling peak - saved: of two neighbours a, b with peak_a - saved_a >= peak_b - saved_b,
on S bytes, a first needs at most

    max(S + peak_a, S + saved_a + peak_b) <= S + saved_b + peak_a,

since saved_b >= 0 and saved_a + peak_b <= saved_b + peak_a by the choice of a; and b first needs S + saved_b + peak_a
at least. What stands before and behind the two sees the same sum, and seconds do not depend on the order; so neighbours
are exchanged until the order falls, and the peak never grew. All numbers of each policy are tried: 861 for 40 layers.

Stages are joined from the last to the first: the whole needs max(peak of the stage, its saved + what the rest needs),
which never falls when the rest needs more, and seconds add up. So of the assignments of the rest only those matter that
no other one beats in both (the Pareto front), and for each stage every one of its own meets every one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.recompute import POLICIES, Policy

Bytes: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Choice:
    """One layer under one policy. Bytes beyond what was alive before it."""

    saved: int  # alive after its forward until its backward
    peak: int  # most at once, in its forward or in its backward (recomputation, gradients and `saved` included)
    seconds: float  # of recomputation in the backward pass


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers that are alike."""

    count: int
    choices: Mapping[Policy, Choice]  # at least one


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
    seconds: NDArray[np.float64]  # [n]

    def policies(self, way: int) -> tuple[Policy, ...]:
        counts = self.counts[way].tolist()
        return tuple(policy for policy, count in zip(self.order, counts, strict=True) for _ in range(count))


@dataclass(frozen=True, slots=True)
class _Front:
    """Assignments of the stages from one to the last that no other one beats in need and in seconds. m of them."""

    need: Bytes  # [m], falling: beyond what is alive before these stages
    seconds: NDArray[np.float64]  # [m], rising
    ways: NDArray[np.int64]  # [m, stages]


def solve(stages: Sequence[Layers], after: int, budget: int) -> Solution:
    """The assignment of least recomputation whose peak is at most `budget` bytes; among these that of the least peak,
    and then the first in a fixed order. Where nothing fits: that of the least peak.

    Args:
        stages: in forward order.
        after: bytes of what follows the last layer (head and loss), forward and backward, beyond what layers keep.
    """
    ways = [_ways(stage) for stage in stages]
    front = _Front(np.array([after]), np.zeros(1), np.zeros((1, 0), np.int64))
    for stage in reversed(ways):
        front = _before(stage, front)
    fitting = np.flatnonzero(front.need <= budget)
    best = int(fitting[0]) if fitting.size else len(front.need) - 1
    chosen = zip(ways, front.ways[best].tolist(), strict=True)
    return Solution(
        policies=tuple(stage.policies(way) for stage, way in chosen),
        peak=int(front.need[best]), seconds=float(front.seconds[best]), fits=bool(fitting.size),
    )  # fmt: skip


def _ways(layers: Layers) -> _Stage:
    known = [policy for policy in POLICIES if policy in layers.choices]
    order = tuple(sorted(known, key=lambda p: layers.choices[p].saved - layers.choices[p].peak))
    choices = [layers.choices[policy] for policy in order]
    counts = np.array(list(_numbers(layers.count, len(order))), np.int64).reshape(-1, len(order))
    saved, peak = np.zeros((2, len(counts)), np.int64)
    for column, choice in zip(counts.T, choices, strict=True):
        most = saved + (column - 1) * choice.saved + choice.peak  # at the last of these layers
        peak = np.where(column > 0, np.maximum(peak, np.maximum(most, saved + choice.peak)), peak)
        saved = saved + column * choice.saved
    seconds = counts @ np.array([choice.seconds for choice in choices])
    return _Stage(order, counts, saved, peak, seconds)


def _numbers(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write `total` as a sum of `parts` numbers."""
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _numbers(total - first, parts - 1)]


def _before(stage: _Stage, rest: _Front) -> _Front:
    """`rest` with a stage before it."""
    need = np.maximum(stage.peak[:, None], stage.saved[:, None] + rest.need)  # [n, m]
    seconds = stage.seconds[:, None] + rest.seconds
    order = np.lexsort((need.ravel(), seconds.ravel()))  # by seconds, then need, then place
    falling = np.minimum.accumulate(need.ravel()[order])
    kept = order[np.flatnonzero(np.diff(falling, prepend=np.iinfo(np.int64).max) < 0)]
    own, others = np.unravel_index(kept, need.shape)
    ways = np.concatenate((own[:, None], rest.ways[others]), axis=1)
    return _Front(need.ravel()[kept], seconds.ravel()[kept], ways)
