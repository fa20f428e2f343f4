"""NF4 weights as bitsandbytes holds them in memory (QuantState) and in files (the keys of a state dict), both ways.

    in memory   packed uint8 [ceil(n / 2), 1]; a QuantState whose absmax is in 8 bits, with a state2 and an offset
    in a file   NAME                                    packed
                NAME.absmax, NAME.nested_absmax         uint8 [blocks], fp32 [ceil(blocks / 256)]
                NAME.quant_map, NAME.nested_quant_map   the tables, fp32 [16] and [256]
                NAME.quant_state.bitsandbytes__nf4      JSON as uint8: shape, dtype, block sizes, offset

transformers writes and reads these keys, NAME being a linear's `weight`. Nothing is computed: the bits stay as they
are. What a NF4Tensor cannot hold is a ValueError: fp4, blocks of another size, absmax in 32 bits, other tables.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.nf4 import BLOCK, BLOCK2, LEVELS, NF4Tensor, dynamic_map

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = "quant_state.bitsandbytes__"


def to_quant_state(q: NF4Tensor) -> tuple[Tensor, Any]:
    """-> (packed, QuantState), views of q's tensors, as `bitsandbytes.functional.quantize_4bit` returns them.

    Raises ValueError for rows of a weight that begin inside of a group of 256 blocks.
    """
    _check_start(q)
    functional: Any = importlib.import_module("bitsandbytes.functional")
    nested = functional.QuantState(absmax=q.absmax2, code=dynamic_map(q.device), blocksize=BLOCK2, dtype=torch.float32)
    state = functional.QuantState(
        absmax=q.absmax_codes, shape=torch.Size(q.shape), code=_levels(q.device), blocksize=BLOCK, quant_type="nf4",
        dtype=q.dtype, offset=q.offset.view(()), state2=nested,
    )  # fmt: skip
    return q.codes[:, None], state


def from_quant_state(packed: Tensor, state: Any, name: str = "weight") -> NF4Tensor:
    """The weight of bitsandbytes' (packed, QuantState), as views where those are contiguous.

    Raises ValueError, with `name`, where it is none.
    """
    nested = state.state2
    return _checked(
        name, packed, state.absmax, quant_type=state.quant_type, blocksize=state.blocksize, shape=state.shape,
        dtype=state.dtype, quant_map=state.code, offset=state.offset,
        absmax2=None if nested is None else nested.absmax,
        nested_blocksize=None if nested is None else nested.blocksize,
        nested_map=None if nested is None else nested.code,
    )  # fmt: skip


def to_serialized(q: NF4Tensor, name: str) -> dict[str, Tensor]:
    """The tensors of a file, on q's device; the tables are copies, since safetensors refuses shared memory.

    Raises ValueError for rows of a weight that begin inside of a group of 256 blocks.
    """
    _check_start(q)
    said = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": str(q.dtype).removeprefix("torch."), "shape": q.shape,
        "nested_blocksize": BLOCK2, "nested_dtype": "float32", "nested_offset": q.offset.item(),
    }  # fmt: skip
    return {
        name: q.codes[:, None],
        f"{name}.absmax": q.absmax_codes,
        f"{name}.quant_map": _levels(q.device),
        f"{name}.nested_absmax": q.absmax2,
        f"{name}.nested_quant_map": dynamic_map(q.device).clone(),
        f"{name}.{STATE}nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }


def from_serialized(tensors: Mapping[str, Tensor], name: str) -> NF4Tensor:
    """The weight `name` among the tensors of a file, on their device.

    Raises:
        ValueError: keys are missing, or what they hold is no NF4 weight with absmax in 8 bits.
    """
    described = [key for key in tensors if key.startswith(f"{name}.quant_state.")]
    if described and described != [f"{name}.{STATE}nf4"]:
        raise ValueError(f"{name}: NF4 is described by {name}.{STATE}nf4, got {', '.join(described)}")
    wanted = [name, f"{name}.{STATE}nf4", *(f"{name}.{part}" for part in ("absmax", "quant_map"))]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise ValueError(f"{name}: bitsandbytes' NF4 needs {', '.join(wanted)}; missing: {', '.join(missing)}")
    try:
        said = json.loads(bytes(tensors[f"{name}.{STATE}nf4"].cpu().tolist()))
        dtype, offset = DTYPES.get(said["dtype"], said["dtype"]), said.get("nested_offset")
        return _checked(
            name, tensors[name], tensors[f"{name}.absmax"], quant_type=said["quant_type"],
            blocksize=said["blocksize"], shape=said["shape"], dtype=dtype, quant_map=tensors[f"{name}.quant_map"],
            offset=None if offset is None else torch.tensor(float(offset), device=tensors[name].device),
            absmax2=tensors.get(f"{name}.nested_absmax"), nested_blocksize=said.get("nested_blocksize"),
            nested_map=tensors.get(f"{name}.nested_quant_map"),
        )  # fmt: skip
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}.{STATE}nf4 is not what bitsandbytes writes: {error!r}") from error


def _check_start(q: NF4Tensor) -> None:
    if q.first_block:
        raise ValueError(
            f"rows of a NF4 weight that begin {q.first_block} blocks after the start of a group of {BLOCK2} have no "
            "form in bitsandbytes: dequantize and quantize them"
        )


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def _checked(
    name: str, packed: Tensor, absmax: Tensor, *, quant_type: str, blocksize: int, shape: Any, dtype: Any,
    quant_map: Tensor, offset: Tensor | None, absmax2: Tensor | None, nested_blocksize: int | None,
    nested_map: Tensor | None,
) -> NF4Tensor:  # fmt: skip
    """The weight, or a ValueError that says what was got and what is accepted."""
    if offset is None or absmax2 is None or nested_map is None:
        raise ValueError(f"{name}: NF4 with absmax in 8 bits is accepted, got it in {absmax.dtype} (not nested)")
    for what, got, accepted in (
        ("quant_type", quant_type, "nf4"),
        ("blocksize", blocksize, BLOCK),
        ("nested_blocksize", nested_blocksize, BLOCK2),
    ):
        if got != accepted:
            raise ValueError(f"{name}: {what} {got!r}; {accepted!r} is accepted")
    if dtype not in DTYPES.values():
        raise ValueError(f"{name}: dtype {dtype}; {', '.join(DTYPES)} are accepted")
    if shape is None or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name}: shape {shape}; a matrix [N, K] is accepted")
    blocks = -(-shape[0] * shape[1] // BLOCK)
    for what, tensor, size, accepted_dtype in (
        ("packed weight", packed.contiguous().view(torch.uint8), -(-shape[0] * shape[1] // 2), torch.uint8),
        ("absmax", absmax, blocks, torch.uint8),
        ("nested_absmax", absmax2, -(-blocks // BLOCK2), torch.float32),
        ("nested_offset", offset, 1, torch.float32),
    ):
        if tensor.numel() != size or tensor.dtype != accepted_dtype:
            raise ValueError(
                f"{name}: {what} of {tensor.numel()} values in {tensor.dtype}; a weight of shape {list(shape)} has "
                f"{size} in {accepted_dtype}"
            )
    cpu = torch.device("cpu")
    for what, table, ours in (
        ("quant_map", quant_map, _levels(cpu)),
        ("nested_quant_map", nested_map, dynamic_map(cpu)),
    ):
        if not torch.equal(table.cpu(), ours):
            raise ValueError(f"{name}: {what} is another table than bitsandbytes' own, which alone is accepted")
    return NF4Tensor(
        codes=packed.contiguous().view(torch.uint8).view(-1), absmax_codes=absmax.contiguous().view(-1),
        absmax2=absmax2.contiguous().view(-1), offset=offset.view(()), shape=(shape[0], shape[1]), dtype=dtype,
    )  # fmt: skip
