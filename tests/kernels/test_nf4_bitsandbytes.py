"""NF4 weights to and from bitsandbytes' QuantState and its files, bit for bit against the installed bitsandbytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.dequantize_nf4 import dequantize_nf4
from kernels.nf4 import NF4Tensor, quantize_nf4
from kernels.nf4_bitsandbytes import from_quant_state, from_serialized, to_quant_state, to_serialized

functional: Any = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(96, 352), (5, 4304), (7, 39), (1, 1)]  # whole blocks, several groups, an odd number of weights, one weight
NAME = "model.layers.0.mlp.up_proj.weight"
PARTS = ("codes", "absmax_codes", "absmax2", "offset")


def weight(shape: tuple[int, int] = (96, 352), dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def theirs(w: Tensor, **options: Any) -> tuple[Tensor, Any]:
    quantize = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"} | options
    return functional.quantize_4bit(w, **quantize)


def file_of(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """As bitsandbytes' Linear4bit puts it in a state dict."""
    return {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


def assert_same_weight(a: NF4Tensor, b: NF4Tensor) -> None:
    assert (a.shape, a.dtype, a.first_block) == (b.shape, b.dtype, b.first_block)
    for part in PARTS:
        mine, other = getattr(a, part), getattr(b, part)
        assert mine.shape == other.shape and mine.dtype == other.dtype and torch.equal(mine, other), part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quant_state_both_ways(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, state = theirs(weight(shape, dtype))
    ours = quantize_nf4(weight(shape, dtype))
    assert_same_weight(from_quant_state(packed, state), ours)
    codes, made = to_quant_state(ours)
    assert codes.shape == packed.shape and torch.equal(codes, packed)
    assert codes.data_ptr() == ours.codes.data_ptr() and made.absmax.data_ptr() == ours.absmax_codes.data_ptr()
    assert made.as_dict().keys() == state.as_dict().keys()
    for key, value in state.as_dict().items():
        got = made.as_dict()[key]
        assert torch.equal(got, value) if isinstance(value, Tensor) else (got == value), key


def test_strided_tensors_become_contiguous() -> None:
    """As a view of others' tensors may be; kernels go by addresses."""
    packed, state = theirs(weight())
    state.absmax, state.state2.absmax = (torch.stack((x, x), dim=-1)[:, 0] for x in (state.absmax, state.state2.absmax))
    q = from_quant_state(packed, state)
    assert all(getattr(q, part).is_contiguous() for part in PARTS)
    assert_same_weight(q, quantize_nf4(weight()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_files_both_ways(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    ours, expected = quantize_nf4(weight(shape, dtype)), file_of(*theirs(weight(shape, dtype)))
    made = to_serialized(ours, NAME)
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert made[key].dtype == tensor.dtype and torch.equal(made[key], tensor), key
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, tmp_path / "ours.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert_same_weight(from_serialized(load_file(tmp_path / "theirs.safetensors"), NAME), ours)


def test_bitsandbytes_reads_our_file() -> None:
    ours = quantize_nf4(weight((96, 320)))  # rows of whole blocks: see tests/kernels/test_nf4.py
    made = to_serialized(ours, NAME)
    state = functional.QuantState.from_dict(
        {key.removeprefix(f"{NAME}."): tensor for key, tensor in made.items() if key != NAME},
        device=torch.device("cpu"),
    )
    assert torch.equal(functional.dequantize_4bit(made[NAME], state), dequantize_nf4(ours))


def test_codes_stored_as_another_dtype_are_the_same_bytes() -> None:
    packed, state = theirs(weight(), quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert_same_weight(from_quant_state(packed, state), quantize_nf4(weight()))


def test_rows_of_a_weight() -> None:
    q = quantize_nf4(weight((512, 128)))
    first = q.rows(0, 128)  # its absmax2 group goes on in the rest
    assert_same_weight(from_serialized(to_serialized(first, NAME), NAME), first)
    packed, state = to_quant_state(first)
    assert torch.equal(functional.dequantize_4bit(packed, state), dequantize_nf4(q)[:128])
    for convert in (to_quant_state, lambda rows: to_serialized(rows, NAME)):
        with pytest.raises(ValueError, match="begin 128 blocks after the start of a group of 256"):
            convert(q.rows(64, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4'; 'nf4' is accepted"),
        ({"blocksize": 128}, "blocksize 128; 64 is accepted"),
        ({"compress_statistics": False}, "got it in torch.float32 (not nested)"),
    ],
)
def test_other_quantizations_are_refused(options: dict[str, Any], message: str) -> None:
    packed, state = theirs(weight(), **options)
    with pytest.raises(ValueError, match=re.escape(f"head: {message}" if "quant" in message else message)):
        from_quant_state(packed, state, "head")
    with pytest.raises(ValueError, match=re.escape("bitsandbytes__fp4" if "fp4" in message else message)):
        from_serialized(file_of(packed, state), NAME)


def edited(changes: dict[str, Any]) -> dict[str, Tensor]:
    """A file whose description, or one of whose tensors, is another."""
    file = to_serialized(quantize_nf4(weight()), NAME)
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(file[key].tolist()))
    for what, value in changes.items():
        if isinstance(value, Tensor):
            file[NAME + what] = value
        else:
            said[what] = value
    file[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nested_blocksize": 64}, "nested_blocksize 64; 256 is accepted"),
        ({"dtype": "float64"}, "dtype float64; float32, float16, bfloat16 are accepted"),
        ({"shape": [96, 353]}, "packed weight of 16896 values in torch.uint8; a weight of shape [96, 353] has 16944"),
        ({"shape": [33792]}, "shape [33792]; a matrix [N, K] is accepted"),
        ({".absmax": torch.zeros(7, dtype=torch.uint8)}, "absmax of 7 values in torch.uint8; a weight of shape"),
        ({".absmax": torch.zeros(528)}, "absmax of 528 values in torch.float32"),
        ({".nested_absmax": torch.zeros(2)}, "nested_absmax of 2 values"),
        ({".quant_map": torch.linspace(-1, 1, 16)}, "quant_map is another table"),
        ({".nested_quant_map": torch.linspace(-1, 1, 256)}, "nested_quant_map is another table"),
        ({"nested_offset": None}, "absmax in 8 bits is accepted"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{NAME}: ") + ".*" + re.escape(message)):
        from_serialized(edited(changes), NAME)


def test_missing_keys_are_listed() -> None:
    file = to_serialized(quantize_nf4(weight()), NAME)
    file = {key: tensor for key, tensor in file.items() if not key.endswith((".absmax", ".quant_map"))}
    with pytest.raises(ValueError, match=re.escape(f"missing: {NAME}.absmax, {NAME}.quant_map")):
        from_serialized(file, NAME)
    with pytest.raises(ValueError, match="missing: head"):
        from_serialized({}, "head")


def test_a_description_that_is_no_json_is_named() -> None:
    file = edited({})
    file[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.tensor([255, 1], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bitsandbytes__nf4 is not what bitsandbytes writes"):
        from_serialized(file, NAME)
