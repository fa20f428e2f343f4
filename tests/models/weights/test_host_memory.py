from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from models.weights.host_memory import trim_heap

MIB = 1 << 20


def anonymous_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs /proc and glibc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_holes_between_tensors_that_stay_go_back_to_the_machine() -> None:
    del_me = torch.ones(30 * MIB, dtype=torch.uint8)
    del del_me  # from here on glibc takes blocks of up to 30 MiB from its heap
    trim_heap()
    before = anonymous_bytes()
    kept, passing = [], []
    for _ in range(32):
        passing.append(torch.ones(2 * MIB, dtype=torch.uint8))
        kept.append(torch.ones(64 << 10, dtype=torch.uint8))
    passing.clear()
    held = anonymous_bytes() - before
    trim_heap()
    assert held > 40 * MIB  # what would stay: 64 MiB, less what older holes took
    assert anonymous_bytes() - before < 8 * MIB
    assert all(int(tensor.sum()) == 64 << 10 for tensor in kept)
