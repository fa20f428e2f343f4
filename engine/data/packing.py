"""What each target of a step weighs, and the tensors of a pack (layout: models/pack.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from engine.data.planning import MODALITY_ROWS, own_rows, plan_packs, round_up
from engine.data.sample import IGNORE, NEWLINE, Sample
from models.pack import FeatureRows, Pack, Segments

if TYPE_CHECKING:
    from models.vlm import VLMConfig

__all__ = [
    "PackForm",
    "Reduction",
    "collate",
    "filled_tokens",
    "first_of_micro_batch",
    "form_of",
    "plan_packs",
    "token_weights",
]

Reduction = Literal["token", "sample", "micro_batch"]


@dataclass(frozen=True, slots=True)
class PackForm:
    """What a model expects of its packs; as it is, LaVIN's."""

    modality: bool = True  # a pack begins with two modality tokens
    tile_tokens: int = 6  # K', embeddings of a tile
    newline: bool = False  # there is an embedding that ends a row of patches: image slots say which row they take


LAVIN = PackForm()


def form_of(config: VLMConfig) -> PackForm:
    """Of packs for the model of this configuration."""
    return PackForm(config.has_modality_token, config.tokens_per_tile, config.image_newline)


def token_weights(samples: Sequence[Sample], reduction: Reduction, micro_batch: int = 1) -> list[Tensor]:
    """The share of each token in the loss of a step that consists of `samples` (of all ranks): fp32 [length] each.

    With n targets in a group, each weighs 1 / (groups * n); all weights of the step sum to one. The group is the whole
    step (`token`), one sample (`sample`), or `micro_batch` samples that follow one another in the step
    (`micro_batch`: the mean of means of a gradient accumulation, whichever packs the samples are in). Groups without
    any target do not count.
    """
    group = {"token": len(samples), "sample": 1, "micro_batch": micro_batch}[reduction]
    targets = np.array([len(sample.supervised) for sample in samples])
    per_group = np.add.reduceat(targets, np.arange(0, len(samples), group))
    groups = max(1, np.count_nonzero(per_group))
    weights = []
    for i, sample in enumerate(samples):
        share = 1.0 / float(groups * max(1, per_group[i // group]))
        weights.append((torch.tensor(sample.labels) != IGNORE).float() * share)
    return weights


def first_of_micro_batch(members: Sequence[int], micro_batch: int) -> tuple[list[int], list[int]]:
    """Who routes whom when the first sample of a micro-batch does (LaVIN's CLIP adapters).

    Args:
        members: places in the step of a pack's samples.
    Returns:
        `routed_by`: for each member the index of its router in members + outside; `outside`: routers elsewhere.
    """
    firsts = [place // micro_batch * micro_batch for place in members]
    outside = sorted(set(firsts) - set(members))
    index = {place: i for i, place in enumerate([*members, *outside])}
    return [index[first] for first in firsts], outside


def collate(
    samples: Sequence[Sample], weights: Sequence[Tensor], tiles: Sequence[Tensor | None], *,
    routed_by: Sequence[int] | None = None, outside: Sequence[Tensor | None] = (), dummy_size: int = 0,
    table_rows: Sequence[int] | None = None, form: PackForm = LAVIN,
) -> Pack:  # fmt: skip
    """One pack of samples, in this order.

    Args:
        samples: those of the pack.
        weights: fp32 [length] for each sample (token_weights); read where a token is a target.
        tiles: fp32 [3, H, W], or [n, 3, H, W] of an image cut into n, for each sample; None where it has no image.
        routed_by: None: each tile routes itself. Else for each sample an index into tiles + outside: the tile there
            (the first, of several) routes this sample's. Where that is None, zeros do. Routers that are no tile of the
            pack yet are appended, after the samples' tiles; they route themselves and have no image slots.
        outside: tiles of routers that are not in this pack.
        dummy_size: H = W of a tile of zeros without image slots that is added where the pack has no tile (0: none is),
            so that every rank runs the tower and gradients meet.
        table_rows: where a table has the features of each sample's image, 0 where it has none; `tiles` are then only of
            images that the tower has not seen, and nothing is routed. Images of one tile only.
        form: what the model expects.
    Raises:
        ValueError: a sample has image slots and no tile (or row) or the reverse, or its first token is a target (there
            is no row that predicts it); or features of a table are to be taken in another order.
    """
    gathered = form.newline or any(sample.image_rows is not None for sample in samples)
    shown = [tile is not None for tile in tiles] if table_rows is None else [row > 0 for row in table_rows]
    for sample, has_image in zip(samples, shown, strict=True):
        if bool(sample.image_slots) != has_image:
            found = f"{len(sample.image_slots)} image slots and {'a' if has_image else 'no'} tile"
            raise ValueError(f"sample {sample.id!r} has {found}: it needs both or neither")
        if sample.labels[0] != IGNORE:
            raise ValueError(f"the first token of sample {sample.id!r} is a target, no row predicts it")
    if table_rows is not None and gathered:
        raise ValueError("features of a table are taken in order, and image_rows asks for another one")
    first = MODALITY_ROWS if form.modality else 0
    lengths = np.array([len(sample.input_ids) for sample in samples])
    starts = first + np.concatenate(([0], np.cumsum(lengths)[:-1]))
    input_ids = np.zeros(round_up(own_rows(modality=form.modality) + int(lengths.sum())), dtype=np.int64)
    slots: list[int] = []
    rows, labels, shares = [], [], []
    for sample, weight, start in zip(samples, weights, starts.tolist(), strict=True):
        input_ids[start : start + len(sample.input_ids)] = sample.input_ids
        slots += [start + slot for slot in sample.image_slots]
        targets = np.array(sample.supervised, dtype=np.int64)
        rows.append(start + targets - 1)
        labels.append(np.array(sample.labels, dtype=np.int64)[targets])
        shares.append(weight.numpy()[targets])
    router, stacked = _route(tiles, routed_by, outside, dummy_size if table_rows is None else 0)
    return Pack(
        input_ids=torch.from_numpy(input_ids),
        segments=_segments(samples, lengths, len(input_ids), first),
        modality_rows=torch.arange(first),
        tiles=stacked,
        tile_router=router,
        image_slots=torch.tensor(slots, dtype=torch.int64),
        supervised=_padded(rows, np.int64),
        labels=_padded(labels, np.int64),
        weights=_padded(shares, np.float32),
        num_samples=len(samples),
        feature_rows=None if table_rows is None else _feature_rows(table_rows, tiles, dummy=dummy_size > 0),
        image_rows=_image_rows(samples, form.tile_tokens, len(router)) if gathered else None,
    )


def filled_tokens(pack: Pack) -> int:
    """Tokens of a pack (on the CPU) that belong to a sample."""
    first = pack.modality_rows.numel()
    return int(pack.segments.cu_seqlens[first + pack.num_samples]) - first


def _segments(samples: Sequence[Sample], lengths: np.ndarray, total: int, modality_rows: int) -> Segments:
    sizes = np.concatenate((np.ones(modality_rows, np.int64), lengths, [total - modality_rows - lengths.sum()]))
    behind = int(modality_rows > 0)  # a modality token has position 0, text follows
    first = np.array([0] * modality_rows + [behind] * len(samples) + [0])
    has_image = [*range(modality_rows), *(int(bool(sample.image_slots)) for sample in samples), 0]
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    positions = np.arange(total) - np.repeat(bounds[:-1] - first, sizes)
    return Segments(
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(sizes.max()),
        position_ids=torch.from_numpy(positions.astype(np.int32)),
        router_row=torch.from_numpy(np.repeat(has_image, sizes).astype(np.int32)),
    )


def _feature_rows(rows: Sequence[int], tiles: Sequence[Tensor | None], *, dummy: bool) -> FeatureRows | None:
    of_images = [row for row in rows if row] or [0] * dummy  # row 0 of a table is zeros
    of_tiles = [row for row, tile in zip(rows, tiles, strict=True) if tile is not None]
    if not of_images:
        return None
    return FeatureRows(
        of_images=torch.tensor(of_images, dtype=torch.int64), of_tiles=torch.tensor(of_tiles, dtype=torch.int64)
    )


def _image_rows(samples: Sequence[Sample], tokens: int, num_tiles: int) -> Tensor:
    """int64 [I]: of each slot, its row among the embeddings of all tiles of the pack, `tokens` a tile, and behind them
    the newline's."""
    before, parts = 0, [np.zeros(0, dtype=np.int64)]
    for sample in samples:
        own = sample.image_rows
        rows = np.arange(len(sample.image_slots)) if own is None else np.array(own, dtype=np.int64)
        parts.append(np.where(rows == NEWLINE, num_tiles * tokens, rows + before * tokens))
        before += sample.num_tiles if sample.image_slots else 0
    return torch.from_numpy(np.concatenate(parts))


def _route(
    tiles: Sequence[Tensor | None], routed_by: Sequence[int] | None, outside: Sequence[Tensor | None], dummy_size: int
) -> tuple[Tensor, Tensor | None]:
    """tile_router int64 [N] and tiles fp32 [N, 3, H, W]: the samples' own, then routers, then a dummy if none."""
    candidates = [None if tile is None else _each(tile) for tile in (*tiles, *outside)]
    own = candidates[: len(tiles)]
    stacked = [tile for found in own for tile in found or ()]
    router = list(range(len(stacked)))
    if routed_by is not None:
        sizes = [len(found or ()) for found in own]
        first = np.concatenate(([0], np.cumsum(sizes))).tolist()
        at: dict[int | None, int] = {i: first[i] for i, size in enumerate(sizes) if size}
        for i, found in enumerate(own):
            routing = candidates[routed_by[i]]
            key = routed_by[i] if routing is not None else None  # one tile of zeros serves all
            if found is None:
                continue
            if key not in at:
                at[key] = len(stacked)
                router.append(len(stacked))
                stacked.append(torch.zeros_like(stacked[0]) if routing is None else routing[0])
            router[first[i] : first[i + 1]] = [at[key]] * sizes[i]
    if not stacked and dummy_size:
        router, stacked = [0], [torch.zeros(3, dummy_size, dummy_size)]
    return torch.tensor(router, dtype=torch.int64), torch.stack(stacked) if stacked else None


def _each(tile: Tensor) -> list[Tensor]:
    """The tiles of one image, [3, H, W] each."""
    return [tile] if tile.ndim == 3 else list(tile)


def _padded(parts: list[np.ndarray], dtype: type) -> Tensor:
    """The parts one after another, zeros up to the next multiple."""
    values = np.concatenate(parts)
    return torch.from_numpy(np.pad(values, (0, round_up(len(values)) - len(values))).astype(dtype))
