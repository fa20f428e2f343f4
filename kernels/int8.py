"""Row-wise int8 weights in bitsandbytes' CB/SCB layout, weight only: packed, and unpacked again.

    scale[n] = max_k |w[n, k]|     codes[n, k] = round(w[n, k] * (127 / scale[n]))     w' = (codes * scale) * (1 / 127)

1 + 4/K bytes a weight. Rounding is half to even; a row of zeros has scale 0 and codes 0. Unpacking is fp32 with one
cast at the end; it reads 1 + 4/K bytes a weight and writes 2 (4 for fp32), csrc in one launch for the weights of a
group. Packing goes through the rows in groups, of about as many weights as NF4's chunks have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import library
from kernels.dispatch import choose, primitive
from kernels.nf4 import chunk

SMALLEST_SCALE = 1e-36  # 127 / scale overflows fp32 below 3.8e-37; the values of such a row round to nearly nothing


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Int8Tensor:
    """A weight in 8 bits. Both tensors are contiguous; `dtype` is what `dequantize_int8` returns by default."""

    codes: Tensor  # int8 [N, K], bitsandbytes' CB
    scale: Tensor  # fp32 [N], largest magnitude of each row, bitsandbytes' SCB
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.scale.nbytes

    def to(self, device: torch.device | str) -> Int8Tensor:
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def rows(self, start: int, stop: int) -> Int8Tensor:
        """Rows start <= n < stop, as views of these tensors.

        Raises ValueError where a bound is out of range.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of an int8 weight with {self.shape[0]} rows")
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop])


@torch.no_grad()
def quantize_int8(weight: Tensor, name: str = "") -> Int8Tensor:
    """Quantize `weight` [N, K] (fp32, fp16 or bf16, finite, any strides) on its device, in fp32.

    Raises ValueError for another dtype or rank, for an empty weight, and for the first non-finite value, which it
    reports by `name` and index.
    """
    label = name or "weight"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{label}: int8 takes fp32, fp16 or bf16 weights, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{label}: int8 takes a non-empty matrix [N, K], got shape {tuple(weight.shape)}")
    groups = range(0, weight.shape[0], max(1, chunk(weight.device) // weight.shape[1]))
    size = groups.step
    scale = torch.cat([weight[row : row + size].abs().amax(dim=1).float() for row in groups])
    if not bool(torch.isfinite(scale).all()):
        where = torch.nonzero(~torch.isfinite(weight))[0].tolist()
        raise ValueError(
            f"{label}: value {weight[where[0], where[1]].item()} at {where}; int8 takes finite weights only"
        )
    factor = 127.0 / scale.clamp(min=SMALLEST_SCALE)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for row in groups:
        codes[row : row + size] = (weight[row : row + size].float() * factor[row : row + size, None]).round_()
    return Int8Tensor(codes=codes, scale=scale, dtype=weight.dtype)


@torch.no_grad()
def dequantize_int8(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] that `q` stores, in `dtype` (default: the dtype it was quantized from)."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    unpack_int8((q,), out)
    return out


def dequantize_int8_reference(q: Int8Tensor, dtype: torch.dtype) -> Tensor:
    return (q.codes.float() * q.scale[:, None]).mul_(1.0 / 127.0).to(dtype)


def unpack_int8(parts: Sequence[Int8Tensor], out: Tensor) -> None:
    """Writes the parts [N_i, K], one under another, into out [sum N_i, K], contiguous, of any floating dtype."""
    if backend_of(out) == "cuda":
        row = 0
        for i in range(0, len(parts), library.MAX_PARTS):
            some = parts[i : i + library.MAX_PARTS]
            rows = sum(part.shape[0] for part in some)
            dequantize_int8_(out[row : row + rows], *arguments_of(some))
            row += rows
        return
    for part, here in zip(parts, out.split([part.shape[0] for part in parts]), strict=True):
        here.copy_(dequantize_int8_reference(part, out.dtype))


def backend_of(out: Tensor) -> str:
    """Who unpacks int8 weights into `out`: "cuda" (csrc) or "reference", which is bitsandbytes' rule too."""
    return choose("dequantize_int8", out, ("cuda", "reference"), {"cuda": library.available_for(out)})


def arguments_of(parts: Sequence[Int8Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parts as primitives take them: codes and scales."""
    return [part.codes for part in parts], [part.scale for part in parts]


def structs_of(codes: list[Tensor], scales: list[Tensor]) -> Any:
    """A ctypes array of csrc's nibble_int8."""
    each = (library.Int8(q.data_ptr(), s.data_ptr(), q.shape[0]) for q, s in zip(codes, scales, strict=True))
    return (library.Int8 * len(codes))(*each)


@primitive("dequantize_int8_(Tensor(a!) out, Tensor[] codes, Tensor[] scales) -> ()", fake=lambda *_: None)
def dequantize_int8_(out: Tensor, codes: list[Tensor], scales: list[Tensor]) -> None:
    """Up to 4 parts, codes [rows_i, K] and scales [rows_i], into out [sum rows, K], contiguous: one launch."""
    library.call(
        "nibble_dequantize_int8", [out, *codes, *scales], structs_of(codes, scales), len(codes), out.shape[1],
        out.data_ptr(), library.DTYPES[out.dtype],
    )  # fmt: skip
