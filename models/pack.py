"""What a model is fed: a pack of samples, token-major, without any padding dimension.

    row 0            text modality token           a segment of length one, position 0
    row 1            image+text modality token     a segment of length one, position 0
    rows 2 ...       sample 0, sample 1, ...       one segment each, positions 1, 2, 3, ...
    last rows        fill up to a multiple of 128  one segment, never supervised

LaVIN's modality token sees only itself and is seen by no other token; as a segment of its own, plain causal
attention within segments gives exactly that mask. It depends only on the modality, so a pack carries two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

P = TypeVar("P", "Segments", "Pack")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The bounds, positions and routing of T tokens in S segments."""

    cu_seqlens: Tensor  # int32 [S + 1], 0 .. T
    max_seqlen: int  # longest segment, known on the host
    position_ids: Tensor  # int32 [T], for RoPE
    router_row: Tensor  # int32 [T], which router row (0 text, 1 image+text) routes this token

    def to(self, device: torch.device | str) -> Segments:
        return _to(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """One forward pass worth of samples: T tokens, N tiles, L supervised rows."""

    input_ids: Tensor  # int64 [T], 0 at modality rows and image slots
    segments: Segments
    modality_rows: Tensor  # int64 [2], where the text and the image+text modality tokens stand
    tiles: Tensor | None  # fp32 [N, 3, H, W]; None when no sample has an image
    tile_router: Tensor  # int64 [N], which tile routes each tile in the tower's adapters (its own, by default)
    image_slots: Tensor  # int64 [M * K], positions of the K tokens of each of the first M tiles
    supervised: Tensor  # int64 [L], rows whose next token is a target
    labels: Tensor  # int64 [L], that next token
    weights: Tensor  # fp32 [L], its share of the step's loss
    num_samples: int

    def to(self, device: torch.device | str) -> Pack:
        return _to(self, device)


def _to(value: P, device: torch.device | str) -> P:
    moved: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            moved[field.name] = item.to(device, non_blocking=True)
        elif isinstance(item, Segments):
            moved[field.name] = item.to(device)
    return replace(value, **moved)
