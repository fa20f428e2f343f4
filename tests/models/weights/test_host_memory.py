from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from models.weights import host_memory
from models.weights.archive import open_archive
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
