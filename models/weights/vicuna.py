"""Vicuna as it was published first: a delta in Hugging Face's layout, to be added to LLaMA's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights.errors import WeightsError
from models.weights.hf_llama import open_hf
from models.weights.source import LanguageSource

SHAPE = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")


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
        change = delta.fetch(name)
        return weight + change[: weight.shape[0]].to(weight.dtype)

    return replace(base, files=(*base.files, *delta.files), names=delta.names, fetch=fetch)


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
