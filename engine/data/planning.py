"""Which samples of a step go into which pack."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import combinations

import numpy as np

MODALITY_ROWS = 2  # of a pack for a model with modality tokens: text, then image+text
MULTIPLE = 128  # a pack's tokens, and its supervised rows, come in multiples of this


def round_up(count: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-count // MULTIPLE) * MULTIPLE


def own_rows(*, modality: bool) -> int:
    """Rows of a pack that belong to no sample, at least: its modality tokens, or without them one behind the samples,
    for image tokens that nobody wants (padding.py)."""
    return MODALITY_ROWS if modality else 1


def most_tiles(tokens_per_batch: int) -> int:
    """Tiles that a pack has at most: one for 256 tokens, so that a pack of short samples that all have an image takes
    no more memory than the plan of a run says. ScienceQA has half of that. (LaVIN's CLIP router, a legacy switch, adds
    the routers of other packs' samples.)"""
    return max(1, tokens_per_batch // 256)


def plan_packs(
    lengths: Sequence[int], tokens_per_batch: int, ranks: int = 1, *, tiles: Sequence[int] | None = None,
    tiles_per_batch: int | None = None, modality: bool = True,
) -> list[list[int]]:  # fmt: skip
    """Spreads samples of these lengths over k packs, k the smallest multiple of `ranks` at which a greedy plan fits.

    Longest first, each sample goes to the pack with the fewest tokens that has room for its tiles; then samples change
    packs as long as that saves padding and makes no pack larger than the largest. A pack, with its own rows and
    rounded up to MULTIPLE, has at most `tokens_per_batch` tokens and `tiles_per_batch` tiles, or what one sample needs.
    No pack is empty; equal arguments give equal plans.

    Args:
        tiles: of each sample; None: they do not count. tiles_per_batch: None: `most_tiles` of the tokens.
        modality: whether packs have modality tokens.
    Raises:
        ValueError: no samples, their number is no multiple of `ranks`, one has no tokens, or `tiles` is of another
            length.
    """
    if not lengths or len(lengths) % ranks or min(lengths) < 1:
        raise ValueError(f"needs a positive multiple of {ranks} samples with tokens each, got lengths {list(lengths)}")
    tiles = [0] * len(lengths) if tiles is None else tiles
    if len(tiles) != len(lengths):
        raise ValueError(f"got the tiles of {len(tiles)} samples beside the lengths of {len(lengths)}")
    own = own_rows(modality=modality)
    capacity = max(tokens_per_batch, round_up(own + max(lengths)))
    room = max(most_tiles(tokens_per_batch) if tiles_per_batch is None else tiles_per_batch, *tiles)
    k = max(-(-sum(lengths) // capacity), -(-sum(tiles) // room))
    k = -(-k // ranks) * ranks
    while (packs := _spread(lengths, tiles, k, capacity, room, own)) is None:
        k += ranks  # ends at the latest with one sample a pack
    _save_padding(packs, lengths, tiles, room, own)
    return [sorted(pack) for pack in packs]


def _sum(pack: list[int], of: Sequence[int]) -> int:
    return sum(of[i] for i in pack)


def _spread(
    lengths: Sequence[int], tiles: Sequence[int], k: int, capacity: int, room: int, own: int
) -> list[list[int]] | None:
    """None where the samples do not fit into k packs in this way."""
    packs: list[list[int]] = [[] for _ in range(k)]
    emptiest = [(0, number) for number in range(k)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        passed = []  # packs that have no room for its tiles
        while emptiest and _sum(packs[emptiest[0][1]], tiles) + tiles[i] > room:
            passed.append(heapq.heappop(emptiest))
        if not emptiest or round_up(own + emptiest[0][0] + lengths[i]) > capacity:
            return None
        load, number = heapq.heappop(emptiest)
        packs[number].append(i)
        for entry in (*passed, (load + lengths[i], number)):
            heapq.heappush(emptiest, entry)
    return packs


def _save_padding(packs: list[list[int]], lengths: Sequence[int], tiles: Sequence[int], room: int, own: int) -> None:
    """Balanced packs are all filled alike, so each loses half a MULTIPLE on average. Moving or swapping samples between
    two packs until one of them ends just below a multiple wins most of that back."""
    largest = max(round_up(own + _sum(pack, lengths)) for pack in packs)
    saved = True
    while saved:
        saved = False
        for a, b in combinations(packs, 2):
            saved |= _exchange(a, b, lengths, tiles, largest, room, own)


def _exchange(
    a: list[int], b: list[int], lengths: Sequence[int], tiles: Sequence[int], largest: int, room: int, own: int
) -> bool:
    """Makes the one exchange between two packs that saves most tokens; False when none saves any."""
    load_a, load_b = _sum(a, lengths), _sum(b, lengths)

    def difference(of: Sequence[int]) -> np.ndarray:
        """What pack a wins by each exchange; entry 0 on a side: nothing goes this way."""
        return np.array([0] + [of[i] for i in b])[None, :] - np.array([0] + [of[i] for i in a])[:, None]

    shift, tile_shift = difference(lengths), difference(tiles)
    tokens_a = -(-(own + load_a + shift) // MULTIPLE) * MULTIPLE
    tokens_b = -(-(own + load_b - shift) // MULTIPLE) * MULTIPLE
    allowed = (tokens_a <= largest) & (tokens_b <= largest) & (load_a + shift > 0) & (load_b - shift > 0)
    allowed &= (_sum(a, tiles) + tile_shift <= room) & (_sum(b, tiles) - tile_shift <= room)
    total = np.where(allowed, tokens_a + tokens_b, np.iinfo(np.int64).max)
    if total.min() >= round_up(own + load_a) + round_up(own + load_b):
        return False
    give_a, give_b = divmod(int(total.argmin()), len(b) + 1)
    moved_a = [a.pop(give_a - 1)] if give_a else []
    moved_b = [b.pop(give_b - 1)] if give_b else []
    a += moved_b
    b += moved_a
    return True
