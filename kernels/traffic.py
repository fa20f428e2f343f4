"""Counts the bytes that each kernel moves, from its own loads and stores, without a GPU.

    python -m kernels.traffic        one line a primitive

    least      each byte of the primitive's inputs that it reads, once, and of its outputs, once
    moved      what goes through device memory: `least`, what it reads or writes of workspaces, and every repeated
               access to a tensor of tokens or one that is written
    reloads    repeated loads of parameters (tensors that are only read, and whose first dimension is not the tokens'):
               served by the L2 cache

Triton's kernels run in Triton's interpreter, csrc's in csrc's emulator. Elements are counted, not the sectors of 32
bytes that they lie in. A repeated access to a tile of tokens that a program has just read may be served by a cache too;
it is counted as moved.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import library, samples
from kernels.dispatch import Kernel, recording
from kernels.launches import Launch
from kernels.samples import Call, Draw

TOKENS, WIDTH = 192, 256  # small: the interpreter counts every element
VARIABLES = ("TRITON_INTERPRET", "NIBBLE_EMULATE")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one call of a primitive; the definitions are at the top of the file."""

    call: str
    least: int
    moved: int
    reloads: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least


@dataclass
class Access:
    """What was loaded from or stored to one tensor."""

    issued: int = 0
    addresses: set[int] = field(default_factory=set)  # of elements
    itemsize: int = 0

    def add(self, addresses: Any, itemsize: int) -> None:
        self.issued += addresses.size * itemsize
        self.itemsize = itemsize
        self.addresses.update(addresses.tolist())

    @property
    def unique(self) -> int:
        return len(self.addresses) * self.itemsize


def count(call: Call, tokens: int) -> Traffic:
    """Runs the call's launcher in the interpreter and the emulator, and counts.

    Raises ValueError without TRITON_INTERPRET=1 and NIBBLE_EMULATE=1.
    """
    for name in VARIABLES:
        if os.environ.get(name) != "1":
            raise ValueError(f"traffic is counted in Triton's interpreter and csrc's emulator: set {name}=1")
    launched: dict[int, Tensor] = {}  # every tensor that a Triton kernel got, by its first address

    def remember(_: Kernel, __: tuple[int, ...], ___: Launch, args: tuple[object, ...], ____: object) -> None:
        launched.update({x.data_ptr(): x for x in args if isinstance(x, Tensor)})

    loads: list[tuple[Any, int]] = []
    stores: list[tuple[Any, int]] = []
    with recording(remember), _watching(loads, stores), library.counting() as accesses:
        result = call.registered.launcher(*call.arguments)
    tensors = [x for x in launched.values() if x.numel()]
    for x, loaded, stored in zip(tensors, _attributed(loads, tensors), _attributed(stores, tensors), strict=True):
        accesses.append(library.Accesses(x, loaded.issued, loaded.unique, stored.issued, stored.unique))
    inputs, outputs = ({x.untyped_storage().data_ptr() for x in _tensors(y)} for y in (call.arguments, result))
    least = moved = reloads = 0
    for access in accesses:
        issued, storage = access.loaded + access.stored, access.tensor.untyped_storage().data_ptr()
        read = access.loaded_distinct if storage in inputs else 0  # what was just written needs no reading
        once = access.stored_distinct + read
        if storage not in inputs | outputs:
            moved += issued
        elif access.stored or access.tensor.shape[:1] == (tokens,):
            least, moved = least + once, moved + issued
        else:
            least, moved, reloads = least + once, moved + once, reloads + issued - once
    return Traffic(call.label, least, moved, reloads)


def _attributed(accesses: list[tuple[Any, int]], tensors: list[Tensor]) -> list[Access]:
    """The accesses to each tensor."""
    found = [Access() for _ in tensors]
    for addresses, itemsize in accesses:
        for tensor, access in zip(tensors, found, strict=True):
            start = tensor.data_ptr()
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (last + 1) * tensor.element_size()
            mine = addresses[(addresses >= start) & (addresses < end)]
            if mine.size:
                access.add(mine, itemsize)
                addresses = addresses[(addresses < start) | (addresses >= end)]
        assert not addresses.size, "an access outside of every tensor"
    return found


@contextmanager
def _watching(loads: list[tuple[Any, int]], stores: list[tuple[Any, int]]) -> Iterator[None]:
    """Notes (addresses, bytes of an element) of each unmasked element that the interpreter loads or stores."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(to: list[tuple[Any, int]], pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        to.append((pointers.data[live].astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8))

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(loads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(stores, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def count_all(tokens: int = TOKENS, width: int = WIDTH) -> Iterator[Traffic]:
    """Every sample call of every op, in fp16."""
    draw = Draw(torch.device("cpu"), torch.float16, torch.Generator().manual_seed(0))
    for op in samples.ops():
        for call in samples.calls(op, draw, tokens, width):
            yield count(call, tokens)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    if any(os.environ.get(name) != "1" for name in VARIABLES):
        environment = os.environ | dict.fromkeys(VARIABLES, "1")
        return subprocess.run([sys.executable, "-m", "kernels.traffic", *argv], env=environment, check=False).returncode
    print(f"{TOKENS} tokens of {WIDTH} channels, fp16; bytes")
    print(f"{'primitive':<44} {'least':>9} {'moved':>9} {'ratio':>6} {'reloads':>9}")
    for row in count_all():
        print(f"{row.call:<44} {row.least:>9} {row.moved:>9} {row.ratio:>6.2f} {row.reloads:>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
