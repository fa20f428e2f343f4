"""The two orders of a head's channels. RoPE turns pairs of them: 2i with 2i + 1 (interleaved: Meta's files) or i with
i + d/2 (half-split: Hugging Face's). Rows of q and k in one order, moved to the other, give the same scores."""

from __future__ import annotations

import re

from torch import Tensor

ROTATED = re.compile(r"layers\.\d+\.attention\.[qk]\.(weight|bias|lora\.b)")


def is_rotated(name: str) -> bool:
    """Whether the tensor of this name (ours within a language model) has a row for each channel of q or k."""
    return ROTATED.fullmatch(name) is not None


def to_interleaved(rows: Tensor, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """Rows of q or k [H * d, ...] from half-split to interleaved, head by head: [2, r/2] -> [r/2, 2]. Only the first
    `rotary_dim` of a head's channels turn (None: all); the rest stay."""
    return _swapped(rows, head_dim, rotary_dim, halves_first=True)


def to_half_split(rows: Tensor, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """The inverse of `to_interleaved`."""
    return _swapped(rows, head_dim, rotary_dim, halves_first=False)


def _swapped(rows: Tensor, head_dim: int, rotary_dim: int | None, *, halves_first: bool) -> Tensor:
    turning = head_dim if rotary_dim is None else rotary_dim
    heads = rows.unflatten(0, (-1, head_dim)).clone()  # [H, d, ...]
    pairs = heads[:, :turning].unflatten(1, (2, turning // 2) if halves_first else (turning // 2, 2))
    heads[:, :turning] = pairs.transpose(1, 2).flatten(1, 2)
    return heads.flatten(0, 1)
