from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from models.weights import host_memory
from models.weights.archive import open_archive
from models.weights.host_memory import trim_heap

MIB = 1 << 20


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def holes() -> tuple[int, int]:
    """Bytes that stay behind tensors that have gone, and after trim_heap. For a process of its own: what a process has
    freed before is where tensors go first."""
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
    assert all(int(tensor.sum()) == 64 << 10 for tensor in kept)
    return held, anonymous_bytes() - before


@pytest.mark.skipif(
    not (Path("/proc/self/status").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="needs /proc and glibc",
)
def test_holes_between_tensors_that_stay_go_back_to_the_machine() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        held, after = pool.submit(holes).result()
    assert held > 50 * MIB > 8 * MIB > after


class Recorder:
    """Stands for the C library; remembers (start, bytes) of every madvise."""

    def __init__(self) -> None:
        self.dropped: list[tuple[int, int]] = []

    def madvise(self, start: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
        self.dropped.append((start.value or 0, length.value))
        return 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="needs MADV_DONTNEED")
def test_no_page_outside_the_file_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expanded tensor is one value on the disk and 245 MB by its nbytes: what follows the mapping in memory is
    anybody's, and dropping anonymous pages empties them."""
    recorder = Recorder()
    monkeypatch.setattr(host_memory, "_libc", lambda: recorder)
    tensors = {"expanded": torch.ones(1).half().expand(30000, 4096), "plain": torch.ones(1 << 16)}
    torch.save(tensors, tmp_path / "w.pth")
    archive = open_archive(tmp_path / "w.pth")
    archive.release("expanded")
    assert recorder.dropped == []
    archive.release("plain")
    ((start, length),) = recorder.dropped
    plain = archive.read("plain")
    assert plain.data_ptr() <= start and start + length <= plain.data_ptr() + plain.nbytes
    assert length >= plain.nbytes - 2 * mmap.PAGESIZE
