"""Dropout masks from a counter: element i of a site keeps its value iff hash(seed, site, i) >= p.

No state and nothing saved: the mask is a pure function of (seed, site, element index), so the reference and the Triton
kernels, the CPU and the GPU, the forward and its recomputation all see the same bits.

    mix(v)  = 32-bit finaliser (two multiplies, three xor-shifts; constants of "lowbias32", C. Wellons, hash-prospector)
    key0    = mix(low32(seed) + mix(site + 0x9e3779b9))              key1 = mix(high32(seed) ^ key0)
    hash(i) = mix(mix(low32(i) ^ key0) + high32(i) + key1)           keep(i) = (hash(i) >> 8) >= floor(p * 2^24)

The seed is an int64 tensor on the device (a CUDA graph replays with a new seed); the site is a number that differs for
every dropout of a model.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Drop probability as an integer out of 2^24; raises ValueError outside [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return int(p * (1 << 24))


def keep_mask(seed: Tensor, site: int, rows: int, cols: int, p: float, device: torch.device | str) -> Tensor:
    """Elements that survive a dropout of probability `p`.

    seed: int64 [1]; site: non-negative, below 2^31. Returns bool [rows, cols] on `device`.
    Raises ValueError for a probability outside [0, 1).
    """
    limit = threshold(p)
    seed = seed.to(device)
    key0 = _mix((seed & _LOW) + _mix(torch.full_like(seed, site + 0x9E3779B9)))
    key1 = _mix(((seed >> 32) & _LOW) ^ key0)
    index = torch.arange(rows * cols, device=device)
    hashed = _mix(_mix((index & _LOW) ^ key0) + (index >> 32) + key1)
    return ((hashed >> 8) >= limit).view(rows, cols)


def _mix(v: Tensor) -> Tensor:
    """The finaliser on int64 tensors holding 32-bit values (int64 products wrap, which keeps the low bits)."""
    v = v & _LOW
    v = ((v ^ (v >> 16)) * 0x7FEB352D) & _LOW
    v = ((v ^ (v >> 15)) * 0x846CA68B) & _LOW
    return v ^ (v >> 16)


@triton.jit
def mix(v: tl.tensor) -> tl.tensor:
    """The finaliser on a uint32 block."""
    v = (v ^ (v >> 16)) * 0x7FEB352D
    v = (v ^ (v >> 15)) * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def keep(seed: tl.tensor, site: tl.tensor, index: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Triton's side of `keep_mask`. seed: int64 scalar; site, limit (of `threshold`): integers; index: int block.

    An index of 32 bits, not negative, has no upper half to add. hash >> 8 >= limit is compared without the shift.
    """
    key0 = mix(seed.to(tl.uint32) + mix(site.to(tl.uint32) + 0x9E3779B9))
    key1 = mix((seed >> 32).to(tl.uint32) ^ key0)
    hashed = mix(index.to(tl.uint32) ^ key0) + key1
    if index.dtype == tl.int64:
        hashed += (index >> 32).to(tl.uint32)
    return mix(hashed) >= (limit.to(tl.uint32) << 8)
