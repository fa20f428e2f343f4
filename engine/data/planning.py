"""Which samples of a step go into which pack."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import combinations

import numpy as np

MODALITY_ROWS = 2  # of every pack: text, then image+text
MULTIPLE = 128  # a pack's tokens, and its supervised rows, come in multiples of this


def round_up(count: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-count // MULTIPLE) * MULTIPLE


def plan_packs(lengths: Sequence[int], tokens_per_batch: int, ranks: int = 1) -> list[list[int]]:
    """Spreads samples of these lengths over k packs, k the smallest multiple of `ranks` at which a greedy plan fits.

    Longest first, each sample goes to the pack with the fewest tokens; then samples change packs as long as that saves
    padding and makes no pack larger than the largest. A pack, with its modality rows and rounded up to MULTIPLE, has at
    most `tokens_per_batch` tokens, or what the longest sample needs. No pack is empty; equal lengths give equal plans.

    Raises:
        ValueError: no samples, their number is no multiple of `ranks`, or one has no tokens.
    """
    if not lengths or len(lengths) % ranks or min(lengths) < 1:
        raise ValueError(f"needs a positive multiple of {ranks} samples with tokens each, got lengths {list(lengths)}")
    capacity = max(tokens_per_batch, _tokens(max(lengths)))
    k = -(-sum(lengths) // capacity // ranks) * ranks
    packs = _spread(lengths, k)
    while max(_tokens(_load(pack, lengths)) for pack in packs) > capacity:
        k += ranks  # ends at the latest with one sample a pack
        packs = _spread(lengths, k)
    _save_padding(packs, lengths)
    return [sorted(pack) for pack in packs]


def _load(pack: list[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in pack)


def _tokens(load: int) -> int:
    return round_up(MODALITY_ROWS + load)


def _spread(lengths: Sequence[int], k: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(k)]
    emptiest = [(0, number) for number in range(k)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, number = heapq.heappop(emptiest)
        packs[number].append(i)
        heapq.heappush(emptiest, (load + lengths[i], number))
    return packs


def _save_padding(packs: list[list[int]], lengths: Sequence[int]) -> None:
    """Balanced packs are all filled alike, so each loses half a MULTIPLE on average. Moving or swapping samples between
    two packs until one of them ends just below a multiple wins most of that back."""
    largest = max(_tokens(_load(pack, lengths)) for pack in packs)
    saved = True
    while saved:
        saved = False
        for a, b in combinations(packs, 2):
            saved |= _exchange(a, b, lengths, largest)


def _exchange(a: list[int], b: list[int], lengths: Sequence[int], largest: int) -> bool:
    """Makes the one exchange between two packs that saves most tokens; False when none saves any."""
    load_a, load_b = _load(a, lengths), _load(b, lengths)
    from_a = np.array([0] + [lengths[i] for i in a])  # entry 0: nothing goes this way
    from_b = np.array([0] + [lengths[i] for i in b])
    shift = from_b[None, :] - from_a[:, None]
    tokens_a = -(-(MODALITY_ROWS + load_a + shift) // MULTIPLE) * MULTIPLE
    tokens_b = -(-(MODALITY_ROWS + load_b - shift) // MULTIPLE) * MULTIPLE
    allowed = (tokens_a <= largest) & (tokens_b <= largest) & (load_a + shift > 0) & (load_b - shift > 0)
    total = np.where(allowed, tokens_a + tokens_b, np.iinfo(np.int64).max)
    if total.min() >= _tokens(load_a) + _tokens(load_b):
        return False
    give_a, give_b = divmod(int(total.argmin()), len(from_b))
    moved_a = [a.pop(give_a - 1)] if give_a else []
    moved_b = [b.pop(give_b - 1)] if give_b else []
    a += moved_b
    b += moved_a
    return True
