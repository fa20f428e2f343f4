"""Gives memory back to the machine that neither torch nor the C library gives back by itself while weights are read."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor


def drop_pages(tensor: Tensor) -> None:
    """Takes the whole pages of a view of a mapped file out of the process. Nobody may have written to them: they are
    the file's then, so nothing is lost, and whoever reads them again gets them from the file.

    Never a page beyond the view's storage: a file may hold a tensor that repeats itself (a stride of 0), whose nbytes
    reach over what lies behind the mapping, and that may be anybody's memory."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or tensor.layout is not torch.strided:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    storage = tensor.untyped_storage()
    end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def trim_heap() -> None:
    """Returns freed pages inside the heap (glibc). Tensors that come and go between others that stay leave holes there,
    which add up to most of a model's size: glibc takes blocks of up to 32 MiB from the heap once it has seen such."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
