"""LoRA merged into the weights that it was trained on.

    W' = W + alpha / rank * B A        W [out, in], A [rank, in], B [out, rank]

The product and the sum are in fp32; W' is rounded once, when it is written. W is read from its file: the 4- or 8-bit
copy that a run trained beside is never merged into.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.weights.archive import Shape
from models.weights.names import check_shapes
from models.weights.write.entries import Entries, Entry, changed

A, B = ".lora.a", ".lora.b"


def merge_lora(
    entries: Entries, lora: Mapping[str, Tensor], config: LoRAConfig, where: str, *, do: str = ""
) -> dict[str, Entry]:
    """`entries` (a model's tensors under our names) with `lora` (`layers.0.attention.q.lora.a`, `.lora.b`) merged in.

    Raises:
        WeightsError: an adapter of a linear that the model does not have, half of one, or one of another shape; all are
            listed. `where` names the adapter, `do` what to do then.
    """
    linears = sorted({name.removesuffix(A).removesuffix(B) for name in lora})
    known = [linear for linear in linears if f"{linear}.weight" in entries]
    expected: dict[str, Shape] = {}
    for linear in known:
        rows, columns = entries[f"{linear}.weight"].shape
        expected |= {linear + A: (config.rank, columns), linear + B: (rows, config.rank)}
    check_shapes(Path(where), {name: tuple(tensor.shape) for name, tensor in lora.items()}, expected, do=do)
    merged = {f"{linear}.weight": (lora[linear + A], lora[linear + B]) for linear in known}
    scale = config.alpha / config.rank
    return {
        name: _with_update(entry, *merged[name], scale) if name in merged else entry for name, entry in entries.items()
    }


def update_of(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A [out, in], fp32."""
    return scale * (b.detach().to(torch.float32) @ a.detach().to(torch.float32))


def _with_update(entry: Entry, a: Tensor, b: Tensor, scale: float) -> Entry:
    return changed(entry, lambda weight: update_of(a, b, scale).add_(weight.to(torch.float32)))
