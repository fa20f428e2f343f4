"""LoRA merged into the weights that it was trained on.

    W' = W + alpha / rank * B A        W [out, in], A [rank, in], B [out, rank]

The product and the sum are in fp32; W' is rounded once, when it is written. W is read from its file: the 4- or 8-bit
copy that a run trained beside is never merged into.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.write.entries import Entries, Entry, changed

A, B = ".lora.a", ".lora.b"


def merge_lora(entries: Entries, lora: Mapping[str, Tensor], config: LoRAConfig, where: str) -> dict[str, Entry]:
    """`entries` (a model's tensors under our names) with `lora` (`layers.0.attention.q.lora.a`, `.lora.b`) merged in.

    Raises:
        WeightsError: an adapter of a linear that the model does not have, half of one, or one of another shape; all are
            listed. `where` names the adapter.
    """
    linears = sorted({name.removesuffix(A).removesuffix(B) for name in lora})
    _check(linears, entries, lora, config.rank, where)
    merged = {f"{linear}.weight": (lora[linear + A], lora[linear + B]) for linear in linears}
    scale = config.alpha / config.rank
    return {
        name: _with_update(entry, *merged[name], scale) if name in merged else entry for name, entry in entries.items()
    }


def update_of(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A [out, in], fp32."""
    return scale * (b.detach().to(torch.float32) @ a.detach().to(torch.float32))


def _with_update(entry: Entry, a: Tensor, b: Tensor, scale: float) -> Entry:
    return changed(entry, lambda weight: update_of(a, b, scale).add_(weight.to(torch.float32)))


def _check(linears: list[str], entries: Entries, lora: Mapping[str, Tensor], rank: int, where: str) -> None:
    missing, extra, mismatched = [], [], []
    for linear in linears:
        entry = entries.get(f"{linear}.weight")
        if entry is None:
            extra.append(linear)
            continue
        for name, expected in ((linear + A, (rank, entry.shape[-1])), (linear + B, (entry.shape[0], rank))):
            if name not in lora:
                missing.append(name)
            elif tuple(lora[name].shape) != expected:
                mismatched.append(f"{name}: got {_text(tuple(lora[name].shape))}, expected {_text(expected)}")
    if missing or extra or mismatched:
        raise WeightsError(
            where, "is no LoRA of this model", missing=missing, extra=extra, mismatched=mismatched,
            do="name the language model that it was trained on with --base",
        )  # fmt: skip


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
