"""CUDA graphs for tests on a CPU: what torch's dispatcher sees is recorded, and replayed on the same tensors.

As in a capture, the host's part is over: a replay does not run any Python of the model, numbers are those of the
recording, and every tensor that was made in it has its place for ever. Reading a value on the host is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import unpacked

HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class TapeRecorder:
    """A `Recorder` (engine/graphs.py)."""

    def __init__(self, obstacle: str = "") -> None:
        self.why_not = obstacle
        self.left = 0  # bytes that passes have left in its memory
        self.released = 0  # times

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def memory(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        unpacked.forget(memory=True)  # what is captured has a buffer of its own
        tape = _Tape()
        try:
            with mock.patch.object(Tensor, "tolist", _refuse), tape:
                work()
        finally:
            tape.undo()
        assert not any(ring.groups for ring in unpacked._rings.values()), "unpacked.forget() ends a capture"

        def replay() -> None:
            tape.replay()
            unpacked.forget()  # the buffer is that of other passes here, but not on a GPU

        return replay

    def held(self) -> int:
        return self.left

    def obstacle(self) -> str:
        return self.why_not

    def release(self, drop: Callable[[], object]) -> None:
        drop()
        self.left = 0
        self.released += 1


def _refuse(tensor: Tensor) -> None:
    raise RuntimeError("the host reads a tensor in a capture")


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.own: set[int] = set()  # storages that were made here
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOST_READS:
            _refuse(args[0])
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        out = func(*args, **kwargs)
        results = tree_leaves(out)
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.own |= {_storage(r) for r in results if isinstance(r, Tensor)} - given
        self.calls.append((func, args, kwargs, results))
        return out

    def undo(self) -> None:
        """A capture runs nothing: what was there before is as it was."""
        for storage, saved in self.before.values():
            storage.copy_(saved)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            for new, place in zip(tree_leaves(func(*args, **kwargs)), results, strict=True):
                if isinstance(place, Tensor) and _storage(new) != _storage(place):
                    place.copy_(new)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]
