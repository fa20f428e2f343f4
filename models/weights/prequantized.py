"""Weights that bitsandbytes quantized before they were saved: several tensors of a file are one weight in few bits.

    NF4     NAME uint8 [ceil(n / 2), 1], NAME.absmax, NAME.quant_map, NAME.nested_absmax, NAME.nested_quant_map,
            NAME.quant_state.bitsandbytes__nf4 (kernels/nf4_bitsandbytes.py), with NAME = LINEAR.weight
    int8    LINEAR.weight int8 [N, K], LINEAR.SCB fp32 [N], LINEAR.weight_format (0: rows)

Both are taken bit for bit. Frozen weights are never dequantized: who asks for other bits than the file has is told so
(models/placement.py), since 16-bit weights made from 4 bits would look like the original and not be it. Only a
projector is (`dense`), which trains on from what its model computed with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kernels.dequantize_nf4 import dequantize_nf4
from kernels.int8 import Int8Tensor, dequantize_int8
from kernels.nf4 import NF4Tensor
from kernels.nf4_bitsandbytes import from_serialized
from models.quantized import Packed
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.names import Part
from models.weights.settings import Settings
from models.weights.view import Tensors

NF4_PART = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)")
INT8_PART = re.compile(r"(.+)\.(SCB|weight_format)")
AGAIN = "quantize the 16-bit model instead: 4 and 8 bits are made when it is read"


class Prequantized:
    """`tensors` with each quantized weight as one: its shape is the weight's, its size that of all its parts."""

    def __init__(self, tensors: Tensors) -> None:
        self.files = tensors.files
        self._tensors = tensors
        self._parts: dict[str, list[str]] = {}  # of a quantized weight -> what lies beside it
        for name in tensors.shapes:
            if (weight := _belongs_to(name)) is not None:
                self._parts.setdefault(weight, []).append(name)
        beside = {name for parts in self._parts.values() for name in parts}
        orphans = [name for weight, parts in self._parts.items() if weight not in tensors.shapes for name in parts]
        if orphans:
            raise WeightsError(tensors.files[0].parent, "parts of quantized weights without the weights", extra=orphans)
        self.shapes: dict[str, Shape] = {n: self._shape(n) for n in tensors.shapes if n not in beside}
        self.sizes = {n: sum(tensors.sizes[p] for p in (n, *self._parts.get(n, ()))) for n in self.shapes}

    def fetch(self, name: str) -> Tensor | Packed:
        """One tensor in its file's dtype, or a weight as it was quantized, as views of the mapped file."""
        if name not in self._parts:
            return self._tensors.fetch(name)
        parts = {part: self._tensors.read(part) for part in (name, *self._parts[name])}
        try:
            return _int8(name, parts) if _scale(name) in parts else from_serialized(parts, name)
        except ValueError as error:
            raise WeightsError(self._tensors.files[0].parent, str(error), do=AGAIN) from error

    def release(self, name: str) -> None:
        for part in (name, *self._parts.get(name, ())):
            self._tensors.release(part)

    def close(self) -> None:
        self._tensors.close()

    def _shape(self, name: str) -> Shape:
        if name not in self._parts or _scale(name) in self._parts[name]:
            return self._tensors.shapes[name]
        weight = self.fetch(name)  # small parts are read, its codes only looked at
        return tuple(weight.shape)


def check_quantization(settings: Settings) -> None:
    """A WeightsError where a config.json (the outermost object) names another way of quantizing than bitsandbytes'."""
    said = settings.inner("quantization_config")
    if said is not None:
        said.only("quant_method", "bitsandbytes")


def dense(weight: Tensor | Packed) -> Tensor:
    """The values that are computed with, in the dtype that was quantized."""
    if isinstance(weight, NF4Tensor):
        return dequantize_nf4(weight)
    return dequantize_int8(weight) if isinstance(weight, Int8Tensor) else weight


def take(weight: Tensor | Packed, part: Part | None, name: str, where: Path) -> Tensor | Packed:
    """The rows of `weight`, the file's `name`, that `part` means (None: all); a WeightsError where it is quantized."""
    if part is None:
        return weight
    if isinstance(weight, Tensor):
        return part.take(weight)
    raise WeightsError(
        where, f"{name} holds q, k and v and is quantized: blocks of it cross their borders",
        do="name the model in 16 bits, of which 4 and 8 are made when it is read",
    )  # fmt: skip


def _belongs_to(name: str) -> str | None:
    """The quantized weight that this tensor is a part of."""
    if match := NF4_PART.fullmatch(name):
        return match[1]
    if match := INT8_PART.fullmatch(name):
        return f"{match[1]}.weight"
    return None


def _scale(name: str) -> str:
    return f"{name.removesuffix('weight')}SCB"


def _int8(name: str, parts: Mapping[str, Tensor]) -> Int8Tensor:
    codes, scale = parts[name], parts[_scale(name)]
    form = parts.get(f"{name}_format")
    if form is not None and form.numel() and int(form.flatten()[0]):
        raise ValueError(f"{name}_format is {int(form.flatten()[0])}; int8 weights by rows (0) are accepted")
    if codes.dtype is not torch.int8 or codes.ndim != 2 or scale.dtype is not torch.float32:
        raise ValueError(f"{name} is {codes.dtype} {list(codes.shape)} with a scale in {scale.dtype}; "
                         "int8 [N, K] with float32 [N] is accepted")  # fmt: skip
    if tuple(scale.shape) != tuple(codes.shape[:1]):
        raise ValueError(f"{_scale(name)} has {list(scale.shape)} values; {name} has {codes.shape[0]} rows")
    return Int8Tensor(codes=codes, scale=scale, dtype=torch.float16)
