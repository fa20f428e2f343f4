"""NF4 weights unpacked: the weight [N, K] that a NF4Tensor stores (its format is in kernels/nf4.py), in any dtype.

    w[i] = level[code_i] * absmax[i // 64]
    absmax[b] = map8[absmax_code_b] * absmax2[(b + first_block) // 256] + offset

fp32 throughout, each operation rounded, one cast at the end: bit for bit what bitsandbytes computes, whoever computes.
0.5159 bytes a weight are read, 2 (4 for fp32) written: by csrc in one launch for all parts of a fused weight or a
group; where csrc is missing by bitsandbytes' CUDA kernels in three a part, with absmax in fp32 between them, 0.25 bytes
a weight more.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import library
from kernels.dispatch import choose, primitive
from kernels.nf4 import BLOCK, BLOCK2, LEVELS, FusedNF4, NF4Tensor, chunk, dynamic_map

INSTALL = "build csrc (make, with nvcc) or install bitsandbytes; NIBBLE_KERNELS=reference runs without either, slowly"


@torch.no_grad()
def dequantize_nf4(q: NF4Tensor | FusedNF4, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] that `q` stores, in `dtype` (default: the dtype it was quantized from).

    Raises BackendError for a tensor on a GPU where neither csrc nor bitsandbytes can unpack it.
    """
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    unpack_nf4(parts_of(q), out)
    return out


def dequantize_nf4_reference(q: NF4Tensor | FusedNF4, dtype: torch.dtype) -> Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for part, rows in zip(parts_of(q), out.split([part.shape[0] for part in parts_of(q)]), strict=True):
        _unpack_in_torch(part, rows)
    return out


def _unpack_in_torch(q: NF4Tensor, out: Tensor) -> None:
    n = q.shape[0] * q.shape[1]
    blocks = slice(q.first_block, q.first_block + q.absmax_codes.numel())
    scale = q.absmax2.repeat_interleave(BLOCK2)[blocks]
    absmax = dynamic_map(q.device).index_select(0, q.absmax_codes.int()).mul_(scale).add_(q.offset)
    pairs, out = _level_pairs(q.device), out.view(-1)
    size = chunk(q.device)
    for start in range(0, n, size):
        stop = min(start + size, n)
        full, block = (stop - start) // BLOCK * BLOCK, start // BLOCK
        levels = pairs.index_select(0, q.codes[start // 2 : (stop + 1) // 2].int()).view(-1)[: stop - start]
        levels[:full].view(-1, BLOCK).mul_(absmax[block : block + full // BLOCK, None])
        levels[full:].mul_(absmax[-1])
        out[start:stop] = levels


def parts_of(q: NF4Tensor | FusedNF4) -> tuple[NF4Tensor, ...]:
    return q.parts if isinstance(q, FusedNF4) else (q,)


def unpack_nf4(parts: Sequence[NF4Tensor], out: Tensor) -> None:
    """Writes the parts [N_i, K], one under another, into out [sum N_i, K], contiguous, of any floating dtype."""
    backend, row = backend_of(out), 0
    if backend == "cuda":
        for i in range(0, len(parts), library.MAX_PARTS):
            some = parts[i : i + library.MAX_PARTS]
            rows = sum(part.shape[0] for part in some)
            dequantize_nf4_(out[row : row + rows], *arguments_of(some))
            row += rows
        return
    for part in parts:
        here = out[row : row + part.shape[0]]
        if backend == "bitsandbytes":
            _unpack_with_bitsandbytes(part, here)
        else:
            _unpack_in_torch(part, here)
        row += part.shape[0]


def backend_of(out: Tensor) -> str:
    """Who unpacks NF4 weights into `out`: "cuda" (csrc), "bitsandbytes" or "reference"."""
    missing = {"cuda": library.available_for(out)}
    if missing["cuda"] and out.is_cuda and _bitsandbytes() is None:
        missing["bitsandbytes"] = f"{missing['cuda']}; bitsandbytes with CUDA is missing"
    return choose("dequantize_nf4", out, ("cuda", "bitsandbytes", "reference"), missing, install=INSTALL)


NF4Arguments = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int], list[int]]


def arguments_of(parts: Sequence[NF4Tensor]) -> NF4Arguments:
    """The parts as primitives take them: codes, absmax_codes, absmax2, offsets, rows and first blocks."""
    return (
        [part.codes for part in parts],
        [part.absmax_codes for part in parts],
        [part.absmax2 for part in parts],
        [part.offset for part in parts],
        [part.shape[0] for part in parts],
        [part.first_block for part in parts],
    )


def structs_of(
    codes: list[Tensor], absmax_codes: list[Tensor], absmax2: list[Tensor], offsets: list[Tensor], rows: list[int],
    first_blocks: list[int],
) -> Any:  # fmt: skip
    """A ctypes array of csrc's nibble_nf4."""
    pointers = ([tensor.data_ptr() for tensor in tensors] for tensors in (codes, absmax_codes, absmax2, offsets))
    return (library.NF4 * len(codes))(*map(library.NF4, *pointers, rows, first_blocks))


@primitive(
    "dequantize_nf4_(Tensor(a!) out, Tensor[] codes, Tensor[] absmax_codes, Tensor[] absmax2, Tensor[] offsets,"
    " int[] rows, int[] first_blocks) -> ()",
    fake=lambda *_: None,
)
def dequantize_nf4_(
    out: Tensor, codes: list[Tensor], absmax_codes: list[Tensor], absmax2: list[Tensor], offsets: list[Tensor],
    rows: list[int], first_blocks: list[int],
) -> None:  # fmt: skip
    """Up to 4 parts [rows_i, K] into out [sum rows, K], contiguous, fp32, fp16 or bf16: one launch."""
    library.call(
        "nibble_dequantize_nf4", [out, *codes, *absmax_codes, *absmax2, *offsets],
        structs_of(codes, absmax_codes, absmax2, offsets, rows, first_blocks), len(codes), out.shape[1],
        out.data_ptr(), library.DTYPES[out.dtype],
    )  # fmt: skip


@cache
def _bitsandbytes() -> Any | None:
    """bitsandbytes.functional, or None where it is missing or has no CUDA kernels."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.addFilter(_is_not_about_our_name)
    try:
        from bitsandbytes import functional
        from bitsandbytes.cextension import lib
    finally:
        log.removeFilter(_is_not_about_our_name)
    return functional if lib.compiled_with_cuda else None


def _is_not_about_our_name(record: logging.LogRecord) -> bool:
    """On its import bitsandbytes looks for a CPU kernel, which we do not use, in Hugging Face's distribution `kernels`,
    finds this folder, and warns."""
    return "cannot import name 'get_kernel' from 'kernels'" not in record.getMessage()


def _unpack_with_bitsandbytes(part: NF4Tensor, out: Tensor) -> None:
    """It knows no first_block: the blocks before the first one of a slice are put back, with any codes."""
    functional = _bitsandbytes()
    assert functional is not None
    codes = part.absmax_codes
    if part.first_block:
        codes = torch.cat((codes.new_zeros(part.first_block), codes))
    absmax = functional.dequantize_blockwise(
        codes, absmax=part.absmax2, code=dynamic_map(part.device), blocksize=BLOCK2
    ).add_(part.offset)[part.first_block :]
    functional.dequantize_4bit(part.codes[:, None], absmax=absmax, out=out, blocksize=BLOCK, quant_type="nf4")


@cache
def _level_pairs(device: torch.device) -> Tensor:
    """Both levels of each byte, high nibble first, fp32 [256, 2]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return torch.cartesian_prod(levels, levels).to(device)
