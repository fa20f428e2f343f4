"""Vicuna as it was published first: a delta in Hugging Face's layout, to be added to LLaMA's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights.errors import WeightsError
from models.weights.hf_llama import open_hf
from models.weights.source import LanguageSource

SHAPE = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
ROWS = 256  # that are added at a time


def open_vicuna(base: LanguageSource, folder: Path, *, legacy_permutation: bool = False) -> LanguageSource:
    """`base` + the delta in `folder`, tensor by tensor, added and rounded in the base's dtype.

    Some deltas have one row more in the embedding and in the head than LLaMA, for a padding token that our tokenizer
    does not have: that one last row is dropped. Any other difference of shape is an error.

    `legacy_permutation` adds the delta of q and k without bringing its rows into our order. That mixes up the channels
    of every head, but LaVIN did it, and its published Vicuna adapters were trained on the result.

    Raises:
        WeightsError: the delta is of another model, or a file of it is wrong.
    """
    delta = open_hf(folder, unpermute=not legacy_permutation)
    _check(base.config, delta.config, folder)

    def fetch(name: str) -> Tensor:
        weight = base.fetch(name)
        return _add(weight, delta.fetch(name), weight if base.allocated(name) else torch.empty_like(weight))

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


def _add(weight: Tensor, change: Tensor, out: Tensor) -> Tensor:
    """out = weight + change, without the rows that `change` has more, a few rows at a time: a delta in another dtype is
    never whole in the base's."""
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, weight.shape[0]))
        torch.add(weight[rows], change[rows].to(weight.dtype), out=out[rows])
    return out


def _check(base: LlamaConfig, delta: LlamaConfig, folder: Path) -> None:
    different = [
        f"{key}: got {getattr(delta, key)}, expected {getattr(base, key)}"
        for key in SHAPE
        if getattr(delta, key) != getattr(base, key)
    ]
    if delta.vocab_size not in (base.vocab_size, base.vocab_size + 1):
        different.append(f"vocab_size: got {delta.vocab_size}, expected {base.vocab_size} or one more")
    if different:
        raise WeightsError(folder, "is a delta to another model", mismatched=different, do="use the base of its size")
