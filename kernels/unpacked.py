"""Packed weights as matrices for cuBLAS: a buffer that is used again and again, and copies that are kept.

    weights(group, dtype)   the matrices of weights that share an x, by one dequantisation or none

There is one buffer for each device, stream and dtype, as large as the largest group, or `scratch_bytes`. It is a ring:
a group is written behind the one before it, over the oldest ones, and as long as it is still there it is not unpacked
again. That serves a training step, whose order is a palindrome: forward 1..L, backward L..1; with checkpointing, in
each layer, recomputation 1..n, backward n..1. Between the two uses of a group lie only those behind it, so a ring
serves the last groups that fit into it together: with one group's room the last linear of a recomputation, with a
layer's room all of them, and one dequantisation is enough for recomputation and backward.

A matrix is valid until the next call on its stream. What reads it must have been launched by then, so one thread at a
time calls, and nothing may keep it: `weights` is for the inside of autograd Functions.

A group is known by its packed tensors: by their identity (weakly, no model is kept alive) and their version, so a
weight that is written in place is unpacked again.

Prefetch (on a GPU, off by default): the group that followed last time is unpacked on a second stream while the product
with this one runs. What followed is remembered by the last two groups and by whether a backward pass is under way,
which tells forward, recomputation and backward apart. The second stream waits for all that was launched before and
writes beside this group, never over what a product may read; where the ring has no room for that, or the weights are
not there (FSDP2 has not gathered them yet), nothing is prefetched.

CUDA graphs: what is captured has a ring of its own, in the graph's memory, and goes by the order learned outside. Call
`forget` as the last thing in a capture: it joins what the second stream still does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.dequantize_nf4 import parts_of, unpack_nf4
from kernels.int8 import Int8Tensor, unpack_int8
from kernels.nf4 import FusedNF4, NF4Tensor

Packed = NF4Tensor | FusedNF4 | Int8Tensor
Key = tuple[Any, ...]

ALIGNMENT = 128  # elements; every group starts at a multiple
MOST_FOLLOWERS = 1 << 14  # that are remembered


@dataclass
class Counters:
    """What `weights` did."""

    hits: int = 0  # the group was still there, or is kept
    dequantisations: int = 0  # of groups, each one launch
    prefetched: int = 0  # of them, ahead of their use


@dataclass
class _Settings:
    scratch_bytes: int = 0
    prefetch: bool = False


class Event(Protocol):
    """The end of some work on the second stream."""

    def wait(self) -> None:
        """What is launched from now on, where the work was asked for, starts after it."""


class SecondStream(Protocol):
    def run(self, work: Callable[[], None]) -> Event:
        """Launches `work` to start after everything that was launched before."""


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream, reader: torch.cuda.Stream) -> None:
        self.event, self.reader = stream.record_event(), reader

    def wait(self) -> None:
        self.event.wait(self.reader)


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> Event:
        reader = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(reader)
        with torch.cuda.stream(self.stream):
            work()
            return _CudaEvent(self.stream, reader)


def _second_stream(device: torch.device) -> SecondStream | None:
    return _CudaStream(device) if device.type == "cuda" else None


class _Group:
    """The matrix of a group, its weights one under another, and what tells whether it still is theirs."""

    def __init__(self, group: Sequence[Packed], tensors: Sequence[Tensor], elements: Tensor, start: int = 0) -> None:
        self.sources = [weakref.ref(tensor) for tensor in tensors]
        self.versions = _versions(tensors)
        self.matrix = elements.view(_rows(group), group[0].shape[1])
        self.start, self.stop = start, start + elements.numel()  # where it lies in a ring, in elements
        self.ready: Event | None = None  # of a prefetch that nothing has waited for

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        same = all(source() is tensor for source, tensor in zip(self.sources, tensors, strict=True))
        return same and self.versions == _versions(tensors)

    def split(self, group: Sequence[Packed]) -> tuple[Tensor, ...]:
        return self.matrix.split([q.shape[0] for q in group])

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.wait()
            self.ready = None


@dataclass
class _Ring:
    """The buffer of one device, stream and dtype, and the groups in it, oldest first. `forget` and `join` come before
    its memory is given back: the allocator does not know of the second stream. (`record_stream` would tell it, but
    then the memory is nobody's until no pool and no capture is in use, and each pass of a step would take its own.)"""

    buffer: Tensor
    second: SecondStream | None = None
    head: int = 0
    groups: dict[Key, _Group] = field(default_factory=dict)
    forgotten: list[_Group] = field(default_factory=list)  # whose prefetch may still be writing
    situation: Key = ()  # keys of the last two groups, and whether a backward pass was under way

    def find(self, key: Key, tensors: Sequence[Tensor]) -> _Group | None:
        found = self.groups.get(key)
        return found if found is not None and found.is_of(tensors) else None

    def grow(self, size: int) -> None:
        """To at least `size` elements and scratch_bytes."""
        size = max(size, _settings.scratch_bytes // self.buffer.itemsize)
        if size > self.buffer.numel():
            self.forget()
            self.join()
            self.buffer = self.buffer.new_empty(0)  # the old one goes first
            self.buffer = _empty(size, self.buffer.dtype, self.buffer.device)

    def forget(self) -> None:
        """The groups; what was learned of their order stays."""
        self.forgotten += [group for group in self.groups.values() if group.ready]
        self.groups.clear()
        self.head, self.situation = 0, ()

    def join(self) -> None:
        """What was forgotten is no longer written, either."""
        for group in self.forgotten:
            group.wait()
        self.forgotten.clear()

    def place(self, size: int, beside: _Group | None = None) -> int | None:
        """Where the next `size` elements go: behind the last ones, or at the start; beside a group that stays, behind
        that. None where they do not fit."""
        for start in (self.head, 0) if beside is None else (self.head, _aligned(beside.stop), 0):
            stop = start + size
            if stop <= self.buffer.numel() and (beside is None or stop <= beside.start or beside.stop <= start):
                return start
        return None

    def take(
        self, key: Key, group: Sequence[Packed], tensors: Sequence[Tensor], beside: _Group | None = None
    ) -> _Group | None:
        """Room for a group, in the place of others; None where there is none. To be filled, and then entered."""
        size = _rows(group) * group[0].shape[1]
        start = self.place(size, beside)
        if start is None:
            return None
        for old, there in list(self.groups.items()):
            if old == key or (there.start < start + size and start < there.stop):
                self.forgotten.append(self.groups.pop(old))
        self.join()
        self.head = _aligned(start + size)
        return _Group(group, tensors, self.buffer[start : start + size], start)

    def prefetch_after(self, second: SecondStream, key: Key, current: _Group, group: Sequence[Packed]) -> None:
        """Learns that this group came next; unpacks the one that followed it last time, if it is not there yet and has
        room beside `current`."""
        if self.situation:
            _followers[self.situation] = tuple(weakref.ref(q) for q in group)
        if len(_followers) > MOST_FOLLOWERS:
            _followers.clear()
        previous = self.situation[1] if self.situation else None
        self.situation = (previous, key, torch._C._current_graph_task_id() != -1)
        known = _followers.get(self.situation, ())
        following = tuple(q for reference in known if (q := reference()) is not None)
        if not following or len(following) < len(known):
            return
        tensors = _tensors(following)
        key = _key(tensors, self.buffer.dtype)
        if key in _kept or self.find(key, tensors) or not all(t.untyped_storage().nbytes() for t in tensors):
            return
        ahead = self.take(key, following, tensors, beside=current)
        if ahead is None:
            return
        matrix = ahead.matrix
        ahead.ready = second.run(lambda: _unpack(following, matrix))
        self.groups[key] = ahead
        counters.dequantisations += 1
        counters.prefetched += 1


counters = Counters()
_settings = _Settings()
_rings: dict[Key, _Ring] = {}
_kept: dict[Key, _Group] = {}
_followers: dict[Key, tuple[weakref.ref[Packed], ...]] = {}  # of a situation, on any ring


def configure(scratch_bytes: int = 0, prefetch: bool = False) -> None:
    """From now on a ring has `scratch_bytes`, or what its largest group takes if that is more (one that is larger
    already stays so until `release`), and where `prefetch`, groups are unpacked ahead of their use on a GPU."""
    _settings.scratch_bytes, _settings.prefetch = scratch_bytes, prefetch


@torch.no_grad()
def weights(group: Sequence[Packed], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The matrices [N_i, K] in `dtype` of a group of weights of equal K on one device, valid until the next call."""
    tensors = _tensors(group)
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:  # shapes only: nothing is unpacked
        matrix = _empty(_rows(group) * group[0].shape[1], dtype, tensors[0].device).view(-1, group[0].shape[1])
        return matrix.split([q.shape[0] for q in group])
    key = _key(tensors, dtype)
    if key in _kept and (kept := _kept_group(key, group, tensors)) is not None:
        return kept.split(group)
    ring = _ring(tensors[0].device, dtype)
    ring.grow(_rows(group) * group[0].shape[1])
    found = ring.find(key, tensors)
    if found is not None:
        found.wait()
        counters.hits += 1
    else:
        found = ring.take(key, group, tensors)
        assert found is not None  # it has grown to hold it
        _unpack(group, found.matrix)
        ring.groups[key] = found
        counters.dequantisations += 1
    if _settings.prefetch:
        ring.second = ring.second or _second_stream(found.matrix.device)
        if ring.second is not None:
            ring.prefetch_after(ring.second, key, found, group)
    return found.split(group)


@torch.no_grad()
def keep(group: Sequence[Packed], dtype: torch.dtype) -> None:
    """Unpacks a group for good: `weights` of just this group returns the copies, as long as it lives. Waits for the
    device, so that every stream may read them."""
    tensors = _tensors(group)
    key = _key(tensors, dtype)
    copies = _Group(group, tensors, _empty(_rows(group) * group[0].shape[1], dtype, tensors[0].device))
    copies.sources[0] = weakref.ref(tensors[0], lambda _: _kept.pop(key, None))
    _unpack(group, copies.matrix)
    if copies.matrix.is_cuda:
        torch.cuda.current_stream(copies.matrix.device).synchronize()
    _kept[key] = copies


def kept_bytes() -> int:
    """Of the copies that are kept."""
    return sum(copies.matrix.nbytes for copies in _kept.values())


def give_up_copies() -> None:
    """Weights whose copies were kept are unpacked at each use from now on, to the same bits. CUDA graphs that read the
    copies must be gone."""
    _kept.clear()


def forget(*, memory: bool = False) -> None:
    """Every group is unpacked anew at its next use, kept ones excepted. The memory stays, but for that of captures,
    unless `memory` is given back too."""
    for where, ring in list(_rings.items()):
        ring.forget()
        if where[-1] or memory:
            if not where[-1] or torch.cuda.is_current_stream_capturing():
                ring.join()
            del _rings[where]


def release() -> None:
    """Gives back all memory, that of the kept copies too."""
    forget(memory=True)
    give_up_copies()
    _followers.clear()


@contextmanager
def apart(size: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """What `weights` does inside has a buffer of its own, of `size` bytes from the start, and leaves no trace: for
    counting on meta tensors."""
    global counters, _settings, _rings, _kept, _followers
    before = counters, _settings, _rings, _kept, _followers
    counters, _settings, _rings, _kept, _followers = Counters(), _Settings(), {}, {}, {}
    _ring(device, dtype).grow(size // dtype.itemsize)
    try:
        yield
    finally:
        counters, _settings, _rings, _kept, _followers = before


def _ring(device: torch.device, dtype: torch.dtype) -> _Ring:
    where: Key = (device, dtype, 0, False)
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        where = (device, dtype, stream, torch.cuda.is_current_stream_capturing())
    ring = _rings.get(where)
    if ring is None:
        ring = _rings[where] = _Ring(_empty(0, dtype, device))
    return ring


def _kept_group(key: Key, group: Sequence[Packed], tensors: Sequence[Tensor]) -> _Group | None:
    kept = _kept[key]
    if any(source() is not tensor for source, tensor in zip(kept.sources, tensors, strict=True)):
        return None
    if kept.versions == _versions(tensors):
        counters.hits += 1
    else:
        _unpack(group, kept.matrix)
        kept.versions = _versions(tensors)
        counters.dequantisations += 1
    return kept


def _empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An ordinary tensor in inference mode too, so that it may be written to outside of it."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _rows(group: Sequence[Packed]) -> int:
    return sum(q.shape[0] for q in group)


def _tensors(group: Sequence[Packed]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for q in group:
        if isinstance(q, Int8Tensor):
            tensors += (q.codes, q.scale)
        else:
            for part in parts_of(q):
                tensors += (part.codes, part.absmax_codes, part.absmax2, part.offset)
    return tensors


def _key(tensors: Sequence[Tensor], dtype: torch.dtype) -> Key:
    return (dtype, *map(id, tensors))


def _versions(tensors: Sequence[Tensor]) -> Key:
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _unpack(group: Sequence[Packed], out: Tensor) -> None:
    """Writes the weights of a group, one under another, into out [sum N_i, K]: a launch for each run of one kind."""
    parts: list[Any] = []
    for q in group:
        parts += (q,) if isinstance(q, Int8Tensor) else parts_of(q)
    row = 0
    for kind, run in groupby(parts, type):
        some = list(run)
        rows = _rows(some)
        (unpack_int8 if kind is Int8Tensor else unpack_nf4)(some, out[row : row + rows])
        row += rows
