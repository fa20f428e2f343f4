"""A frozen weight in few bits as a module of parameters: devices, state dicts, DDP and FSDP2 treat it as any other.

    NF4     codes uint8 [ceil(n / 2)], absmax_codes uint8 [blocks], absmax2 int32 [ceil(blocks / 256)], offset int32 [1]
    int8    codes int8 [N, K], scale int32 [N]

The fp32 scales are kept as int32, their bits: casts (`half()`, `to(dtype)`, FSDP2's mixed precision) leave integers
alone, so none of them can round a scale. `offset` has a dimension because FSDP2 refuses scalars. No gradient, ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.int8 import Int8Tensor
from kernels.nf4 import BLOCK, BLOCK2, NF4Tensor

Packed = NF4Tensor | Int8Tensor
Spec = tuple[torch.dtype, tuple[int, ...]]  # what is known of a tensor before it is there


def parts(weight: Packed) -> dict[str, Tensor]:
    """The tensors of a packed weight, scales in fp32, for a file of them; `from_parts` puts them together again."""
    if isinstance(weight, Int8Tensor):
        return {"codes": weight.codes, "scale": weight.scale}
    offset = weight.offset.view(1)
    return {"codes": weight.codes, "absmax_codes": weight.absmax_codes, "absmax2": weight.absmax2, "offset": offset}


def part_specs(shape: tuple[int, int], bits: int) -> dict[str, Spec]:
    """Dtypes and shapes of the `parts` of a weight [N, K] that will be quantized to 4 or 8 bits."""
    if bits == 8:
        return {"codes": (torch.int8, shape), "scale": (torch.float32, shape[:1])}
    values = math.prod(shape)
    blocks = -(-values // BLOCK)
    return {
        "codes": (torch.uint8, ((values + 1) // 2,)), "absmax_codes": (torch.uint8, (blocks,)),
        "absmax2": (torch.float32, (-(-blocks // BLOCK2),)), "offset": (torch.float32, (1,)),
    }  # fmt: skip


def from_parts(tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Packed:
    """The weight [N, K] whose `parts` these are; `dtype` is what it was quantized from.

    Raises:
        ValueError: a part is missing, or is not of the dtype and shape that [N, K] asks for: kernels do not look.
    """
    expected = part_specs(shape, 8 if "scale" in tensors else 4)
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
    for part in sorted(found.keys() | expected.keys()):
        if found.get(part) != expected.get(part):
            raise ValueError(
                f"{part} of a packed weight {list(shape)} is {found.get(part)}; expected {expected.get(part)}"
            )
    if "scale" in tensors:
        return Int8Tensor(codes=tensors["codes"], scale=tensors["scale"], dtype=dtype)
    return NF4Tensor(
        codes=tensors["codes"], absmax_codes=tensors["absmax_codes"], absmax2=tensors["absmax2"],
        offset=tensors["offset"].view(()), shape=shape, dtype=dtype,
    )  # fmt: skip


class QuantizedWeight(nn.Module):
    """The parameters of `weight`, which share its memory (the shape is not among them: the module knows it)."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.kind = type(weight)
        self.shape, self.dtype = weight.shape, weight.dtype
        self.first_block = weight.first_block if isinstance(weight, NF4Tensor) else 0
        self.codes = _frozen(weight.codes)
        if isinstance(weight, NF4Tensor):
            self.absmax_codes = _frozen(weight.absmax_codes)
            self.absmax2 = _frozen(_bits(weight.absmax2))
            self.offset = _frozen(_bits(weight.offset.view(1)))
        else:
            self.scale = _frozen(_bits(weight.scale))
        self._packed: tuple[list[nn.Parameter | None], int, Packed] | None = None

    def packed(self) -> Packed:
        """The weight for an op: the same object as long as the parameters are the same and nobody wrote to them, since
        kernels/unpacked.py knows a weight by its identity."""
        parameters = list(self._parameters.values())
        version = sum(p._version for p in parameters if p is not None and not p.is_inference())
        if self._packed is not None:
            seen, seen_version, packed = self._packed
            if version == seen_version and all(a is b for a, b in zip(seen, parameters, strict=True)):
                return packed
        packed = self._pack()
        self._packed = parameters, version, packed
        return packed

    def _pack(self) -> Packed:
        codes = self.codes.detach()
        if self.kind is Int8Tensor:
            return Int8Tensor(codes=codes, scale=_floats(self.scale), dtype=self.dtype)
        return NF4Tensor(
            codes=codes, absmax_codes=self.absmax_codes.detach(), absmax2=_floats(self.absmax2),
            offset=_floats(self.offset).view(()), shape=self.shape, dtype=self.dtype, first_block=self.first_block,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moves and copies; torch puts the new memory under the old parameters, whose identity then says nothing."""
        self._packed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own parameters."""
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        return f"{self.kind.__name__} {list(self.shape)}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _bits(scale: Tensor) -> Tensor:
    return scale.view(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return bits.detach().view(torch.float32)
