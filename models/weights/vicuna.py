"""Vicuna as it was published first: a delta in Hugging Face's layout, to be added to LLaMA's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.language.config import DecoderConfig
from models.quantized import Packed
from models.weights.errors import WeightsError
from models.weights.rope_order import is_rotated, to_half_split, to_interleaved
from models.weights.source import LanguageSource

SHAPE = ("family", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "qkv_bias", "o_bias", "mlp_bias")
ROWS = 256  # that are added at a time


def add_delta(
    base: LanguageSource, delta: LanguageSource, folder: Path, *, legacy_permutation: bool = False
) -> LanguageSource:
    """`base` + the `delta` in `folder`, tensor by tensor, added and rounded in the base's dtype. Rows of q and k are
    brought into the base's order first.

    Some deltas have one row more in the embedding and in the head than LLaMA, for a padding token that our tokenizer
    does not have: that one last row is dropped. Any other difference of shape is an error.

    `legacy_permutation` adds the delta's rows of q and k, which are half-split, as if they were interleaved as the
    base's in Meta's files. That mixes up the channels of every head, but LaVIN did it, and its published Vicuna
    adapters were trained on the result.

    Raises:
        WeightsError: the delta is of another model, or one of the two is quantized.
    """
    _check(base.config, delta.config, folder)
    head_dim, interleaved = base.config.head_dim, base.config.rope_interleaved

    def change(name: str) -> Tensor:
        tensor = _plain(delta.fetch(name), name, folder)
        if not is_rotated(name) or interleaved == legacy_permutation:
            return tensor
        return to_interleaved(tensor, head_dim) if interleaved else to_half_split(tensor, head_dim)

    def fetch(name: str) -> Tensor:
        weight = _plain(base.fetch(name), name, base.files[0].parent)
        return _add(weight, change(name), weight if base.allocated(name) else torch.empty_like(weight))

    def release(name: str) -> None:
        base.release(name)
        delta.release(name)

    def close() -> None:
        base.close()
        delta.close()

    return replace(
        base, files=(*base.files, *delta.files), names=delta.names,
        sizes={name: base.sizes[name] + delta.sizes[name] for name in delta.names},
        fetch=fetch, release=release, close=close, allocated=lambda name: True,
    )  # fmt: skip


def _plain(tensor: Tensor | Packed, name: str, folder: Path) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise WeightsError(folder, f"{name} is quantized; a delta is added to 16-bit weights, and is 16-bit itself")
    return tensor


def _add(weight: Tensor, change: Tensor, out: Tensor) -> Tensor:
    """out = weight + change, without the rows that `change` has more, a few rows at a time: a delta in another dtype is
    never whole in the base's."""
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, weight.shape[0]))
        torch.add(weight[rows], change[rows].to(weight.dtype), out=out[rows])
    return out


def _check(base: DecoderConfig, delta: DecoderConfig, folder: Path) -> None:
    different = [
        f"{key}: got {getattr(delta, key)}, expected {getattr(base, key)}"
        for key in SHAPE
        if getattr(delta, key) != getattr(base, key)
    ]
    if delta.vocab_size not in (base.vocab_size, base.vocab_size + 1):
        different.append(f"vocab_size: got {delta.vocab_size}, expected {base.vocab_size} or one more")
    if different:
        raise WeightsError(folder, "is a delta to another model", mismatched=different, do="use the base of its size")
