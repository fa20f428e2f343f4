"""Memory that does not depend on a pack: weights as they are stored, what trains and its optimiser. Counted from shapes
alone. The buffer for unpacked weights is not among it: accounting.py counts that."""

from __future__ import annotations

from math import prod

from torch import nn

from engine.config import BITS, Config
from engine.optim import ALIGN
from engine.plan.meta_model import Bits
from models.adapters.names import is_adapter
from models.quantized import part_specs
from models.vlm import VisionLanguageModel

PARTS = ("language", "vision", "projector", "adapters", "modality_embedding")


def bits_of(config: Config) -> Bits:
    """How this configuration stores frozen linears."""
    return Bits(BITS[config.bits], BITS[config.bits_head], BITS[config.bits_vision])


def stored_bytes(out_features: int, in_features: int, bits: int, dense_bytes: int) -> int:
    """Bytes of one frozen [out, in] weight: NF4 with double quantisation, row-wise int8, or dense."""
    shape = out_features, in_features
    if bits == 16:
        return dense_bytes * prod(shape)
    return sum(dtype.itemsize * prod(size) for dtype, size in part_specs(shape, bits).values())


def parameters_by_part(model: VisionLanguageModel) -> dict[str, int]:
    """Numbers of parameters; the model may be on the meta device."""
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = "adapters" if is_adapter(name) else name.split(".", 1)[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def frozen_bytes(model: VisionLanguageModel, bits: Bits, dense_bytes: int) -> dict[str, int]:
    """Bytes of the frozen weights of a model that is whole and in plain tensors, by part."""
    stored = {"language layers": 0, "embedding": 0, "head": 0, "vision tower": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        part, width = _storage(bits, name, parameter)
        columns = parameter[0].numel() if parameter.ndim > 1 else 1
        stored[part] += stored_bytes(parameter.shape[0], columns, width, dense_bytes)
    return stored


def _storage(bits: Bits, name: str, parameter: nn.Parameter) -> tuple[str, int]:
    """Part and bits of a frozen tensor."""
    if name.startswith("language.embed"):
        return "embedding", 16
    if name.startswith("language.head"):
        return "head", bits.head if parameter.ndim == 2 else 16
    in_layer = ".layers." in name and parameter.ndim == 2
    if name.startswith("vision"):
        return "vision tower", bits.vision if in_layer else 16
    return "language layers", bits.layers if in_layer else 16


def training_bytes(model: VisionLanguageModel, num_ranks: int) -> dict[str, int]:
    """Bytes of what trains, in fp32: weights, gradients (and DDP's buckets, a copy of them), both moments, as the
    optimiser lays them out (engine/optim.py)."""
    elements = sum(-(-p.numel() // ALIGN) * ALIGN for p in model.trainable().values())
    return {
        "adapters and other trained weights": 4 * elements,
        "gradients": 4 * elements * min(num_ranks, 2),
        "optimizer": 8 * elements + 4,  # and the number of steps
    }
