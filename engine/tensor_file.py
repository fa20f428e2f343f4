"""Writing safetensors as a stream: one tensor at a time on the host, the checksum taken on the way.

The format: 8 bytes little-endian header length; a JSON header {name: {dtype, shape, data_offsets}} padded with spaces
to 8 bytes; the tensors' bytes, back to back. safetensors' own writer wants every tensor on the host at once and gives
no checksum; reading is left to it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
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
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"tensor {name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        crc = zlib.crc32(head)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                file.write(chunk)
                crc = zlib.crc32(chunk, crc)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + offset, crc
