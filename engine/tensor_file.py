"""Writing safetensors as a stream: one tensor at a time on the host, the checksum taken on the way.

The format: 8 bytes little-endian header length; a JSON header {name: {dtype, shape, data_offsets}} padded with spaces
to 8 bytes; the tensors' bytes, back to back. safetensors' own writer wants every tensor on the host at once and gives
no checksum; reading is left to it.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK = 1 << 24  # 16 MiB a write


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Write and fsync a new file. Returns (bytes, crc32).

    Tensors of any device, layout and dtype in DTYPES (TypeError otherwise); the wider dtypes come first, so that every
    tensor is aligned in a mapped file.
    """
    head, places = _header({name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)})
    size = len(head)
    with path.open("xb") as file:
        file.write(head)
        crc = zlib.crc32(head)
        for name in places:
            for chunk in _chunks(tensors[name]):
                file.write(chunk)
                crc = zlib.crc32(chunk, crc)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, crc


class TensorWriter:
    """A new file whose tensors are known by dtype and shape, and arrive one by one in any order.

    Raises, on the way, ValueError for a tensor that was not announced or is of another kind, or that never came.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.specs = specs
        self.head, self._places = _header(specs, metadata)
        self._file = path.open("xb")
        try:
            self._file.write(self.head)
        except OSError:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> int:
        """Puts a tensor of any device in its place. Returns the crc32 of its bytes."""
        spec = (tensor.dtype, tuple(tensor.shape))
        if name not in self._places or spec != self.specs[name]:
            raise ValueError(f"tensor {name} is {spec}; announced, once, is {self.specs.get(name)}")
        self._file.seek(self._places.pop(name))
        crc = 0
        for chunk in _chunks(tensor):
            self._file.write(chunk)
            crc = zlib.crc32(chunk, crc)
        return crc

    def finish(self) -> int:
        """Makes the file durable and closes it. Returns its size in bytes."""
        if self._places:
            raise ValueError(f"{len(self._places)} tensors never came, such as {next(iter(self._places))}")
        size = self._file.seek(0, os.SEEK_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return size

    def close(self) -> None:
        """Ends the writing, whether all is there or not. After finish() there is nothing left to do; before it the file
        is given up, so that what a full disk does not take any more (the rest of a buffer) is no error."""
        with suppress(OSError):
            self._file.close()


def file_size(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of a file of these tensors."""
    return len(_header(specs)[0]) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _header(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor's begin: wider dtypes first, else in the order given."""
    header: dict[str, Mapping[str, object]] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    ordered = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    for name in ordered:
        dtype, shape = specs[name]
        if dtype not in DTYPES:
            raise TypeError(f"tensor {name} has dtype {dtype}, which a file of ours cannot hold")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    starts: dict[str, int] = {}
    offset = len(head)
    for name in ordered:
        starts[name] = offset
        offset += math.prod(specs[name][1]) * specs[name][0].itemsize
    return head, starts


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor of any device and layout, CHUNK at a time."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]
