"""What a model is fed: a pack of samples, token-major, without any padding dimension.

    row 0            text modality token           a segment of length one, position 0
    row 1            image+text modality token     a segment of length one, position 0
    rows 2 ...       sample 0, sample 1, ...       one segment each, positions 1, 2, 3, ...
    last rows        fill up to a multiple of 128  one segment, never supervised

LaVIN's modality token sees only itself and is seen by no other token; as a segment of its own, plain causal
attention within segments gives exactly that mask. It depends only on the modality, so a pack carries two of them.

Without MMA adapters in the language model there are no modality tokens: samples begin at row 0, with position 0.

Images come as tiles for the tower or, where a frozen tower has seen them before, as its features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

P = TypeVar("P", bound="Segments | FeatureRows | Pack")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The bounds, positions and routing of T tokens in S segments."""

    cu_seqlens: Tensor  # int32 [S + 1], 0 .. T
    max_seqlen: int  # longest segment, known on the host
    position_ids: Tensor  # int32 [T], for RoPE
    router_row: Tensor  # int32 [T], which router row (0 text, 1 image+text) routes this token

    def to(self, device: torch.device | str) -> Segments:
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRows:
    """Rows of a table of features (engine/tower_cache.py) for a pack of N images, n of which are new as tiles."""

    of_images: Tensor  # int64 [N]
    of_tiles: Tensor  # int64 [n], where the tower's output for each tile is to be put


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """One forward pass worth of samples: T tokens, N tiles, L supervised rows."""

    input_ids: Tensor  # int64 [T], 0 at modality rows and image slots
    segments: Segments
    modality_rows: Tensor  # int64 [2], where the text and the image+text modality tokens stand; [0] without any
    tiles: Tensor | None  # fp32 [N, 3, H, W]; None when no sample has an image
    tile_router: Tensor  # int64 [N], which tile routes each tile in the tower's adapters (its own, by default)
    image_slots: Tensor  # int64 [I], positions of image embeddings
    supervised: Tensor  # int64 [L], rows whose next token is a target
    labels: Tensor  # int64 [L], that next token
    weights: Tensor  # fp32 [L], its share of the step's loss
    num_samples: int
    features: Tensor | None = None  # [N, K, W], the output of a frozen tower; then there are no tiles
    feature_rows: FeatureRows | None = None  # where `features` will come from; gone once they are there
    image_rows: Tensor | None = None  # int64 [I]: which row of (projected tiles [N * K', D], image_newline [1, D]) each
    # slot takes; None: the slots take the embeddings of the first tiles, in order

    def to(self, device: torch.device | str) -> Pack:
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Pack:
        """A copy in memory from which a GPU copies without the host waiting."""
        return map_tensors(self, Tensor.pin_memory)


def map_tensors(value: P, function: Callable[[Tensor], Tensor]) -> P:
    """The same with another tensor for each of its tensors."""
    new: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            new[field.name] = function(item)
        elif isinstance(item, Segments | FeatureRows):
            new[field.name] = map_tensors(item, function)
    return replace(value, **new)


def named_tensors(value: Segments | FeatureRows | Pack, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor by its name, `segments.cu_seqlens`, in a fixed order."""
    found: dict[str, Tensor] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            found[prefix + field.name] = item
        elif isinstance(item, Segments | FeatureRows):
            found |= named_tensors(item, f"{prefix}{field.name}.")
    return found
