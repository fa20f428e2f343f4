"""NF4 weights unpacked: the weight [N, K] that a NF4Tensor stores (its format is in kernels/nf4.py), in any dtype.

    w[i] = level[code_i] * absmax[i // 64]     absmax[b] = map8[absmax_code_b] * absmax2[b // 256] + offset

fp32 throughout, each operation rounded, one cast at the end: bit for bit what bitsandbytes computes.
0.5159 bytes a weight are read, 2 (4 for fp32) written.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.nf4 import BLOCK, BLOCK2, LEVELS, NF4Tensor, chunk, dynamic_map


@torch.no_grad()
def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] that `q` stores, in `dtype` (default: the dtype it was quantized from)."""
    dtype = dtype or q.dtype
    if _backend(q.codes) == "cuda":
        return _dequantize_bitsandbytes(q, dtype)
    return dequantize_nf4_reference(q, dtype)


def dequantize_nf4_reference(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    n = q.shape[0] * q.shape[1]
    scale = q.absmax2.repeat_interleave(BLOCK2)[: q.absmax_codes.numel()]
    absmax = dynamic_map(q.device).index_select(0, q.absmax_codes.int()).mul_(scale).add_(q.offset)
    pairs = _level_pairs(q.device)
    out = torch.empty(n, dtype=dtype, device=q.device)
    size = chunk(q.device)
    for start in range(0, n, size):
        stop = min(start + size, n)
        full, block = (stop - start) // BLOCK * BLOCK, start // BLOCK
        levels = pairs.index_select(0, q.codes[start // 2 : (stop + 1) // 2].int()).view(-1)[: stop - start]
        levels[:full].view(-1, BLOCK).mul_(absmax[block : block + full // BLOCK, None])
        levels[full:].mul_(absmax[-1])
        out[start:stop] = levels
    return out.view(q.shape)


def _backend(codes: Tensor) -> str:
    """Who dequantizes: bitsandbytes' CUDA kernels ("cuda") where they are installed, or torch's rule ("reference")."""
    missing = {"cuda": "bitsandbytes with CUDA is missing"} if codes.is_cuda and _bitsandbytes() is None else None
    return choose("dequantize_nf4", codes, ("cuda", "reference"), missing)


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


def _dequantize_bitsandbytes(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    assert functional is not None
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    absmax = functional.dequantize_blockwise(
        q.absmax_codes, absmax=q.absmax2, code=dynamic_map(q.device), blocksize=BLOCK2
    ).add_(q.offset)
    functional.dequantize_4bit(q.codes[:, None], absmax=absmax, out=out, blocksize=BLOCK, quant_type="nf4")
    return out


@cache
def _level_pairs(device: torch.device) -> Tensor:
    """Both levels of each byte, high nibble first, fp32 [256, 2]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return torch.cartesian_prod(levels, levels).to(device)
