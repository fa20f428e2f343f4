"""csrc's dequantisation against torch's: the same bits, each byte once, nothing out of bounds.

On a GPU where csrc is built, else in the emulator.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc import build
from kernels import library
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.int8 import Int8Tensor, dequantize_int8, quantize_int8
from kernels.nf4 import BLOCK, LEVELS, NF4Tensor, dynamic_map, quantize_nf4

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not library.missing() else "cpu")
counted = pytest.mark.skipif(DEVICE.type == "cuda", reason="only the emulator counts and checks accesses")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and build.find_cxx() is None, reason="no C++ compiler")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NF4_SHAPES = [(1, 1), (1, 7), (1, 8), (3, 5), (1, 64), (2, 33), (5, 2730), (3, 4304), (4, 4096), (129, 127), (1, 2049)]
INT8_SHAPES = [(1, 1), (1, 8), (3, 5), (5, 1024), (3, 1032), (9, 2730), (3, 4304), (4, 4096), (129, 127), (2, 1023)]


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_EMULATE", "1")


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of them zero: absmax codes from all over the map."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator).mul(3).exp()
    sizes[rows // 2] *= rows == 1
    return (torch.randn(rows, columns, generator=generator) * sizes).to(DEVICE)


def unaligned(x: Tensor, elements: int = 1) -> Tensor:
    """The same values, `elements` further in memory than torch would put them."""
    moved = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)[elements:].view(x.shape)
    return moved.copy_(x)


def tensors_of(q: NF4Tensor) -> list[Tensor]:
    return [q.codes, q.absmax_codes, q.absmax2, q.offset]


def part_of(q: NF4Tensor, first_block: int = 0) -> library.NF4:
    return library.NF4(*(x.data_ptr() for x in tensors_of(q)), q.shape[0], first_block)


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Not a number where nothing is written."""
    return torch.full((rows, columns), float("nan"), dtype=dtype, device=DEVICE)


def run_nf4(parts: list[NF4Tensor], out: Tensor, first_block: int = 0) -> Tensor:
    structs = (library.NF4 * len(parts))(*(part_of(q, first_block) for q in parts))
    tensors = [out, *(x for q in parts for x in tensors_of(q))]
    dtype = library.DTYPES[out.dtype]
    library.call("nibble_dequantize_nf4", tensors, structs, len(parts), out.shape[1], out.data_ptr(), dtype)
    return out


def run_int8(parts: list[Int8Tensor], out: Tensor) -> Tensor:
    fields = [(q.codes.data_ptr(), q.scale.data_ptr(), q.shape[0]) for q in parts]
    structs = (library.Int8 * len(parts))(*(library.Int8(*values) for values in fields))
    tensors = [out, *(x for q in parts for x in (q.codes, q.scale))]
    dtype = library.DTYPES[out.dtype]
    library.call("nibble_dequantize_int8", tensors, structs, len(parts), out.shape[1], out.data_ptr(), dtype)
    return out


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    wrong = found.view(BITS[found.dtype]) != expected.view(BITS[expected.dtype])
    assert not wrong.any(), f"{int(wrong.sum())} values, first at {torch.nonzero(wrong)[0].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NF4_SHAPES, ids=str)
def test_nf4_equals_torch_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = quantize_nf4(random_weight(*shape))
    assert_same_bits(run_nf4([q], empty(*shape, dtype)), dequantize_nf4_reference(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_has_every_level_and_every_absmax(dtype: torch.dtype) -> None:
    """The tables in nf4.cuh: 256 blocks with the 256 absmax codes, each with all 16 levels."""
    nibbles = torch.arange(16, dtype=torch.uint8).repeat(256 * BLOCK // 16)
    q = NF4Tensor(
        codes=nibbles[::2] << 4 | nibbles[1::2],
        absmax_codes=torch.arange(256, dtype=torch.uint8),
        absmax2=torch.ones(1),
        offset=torch.zeros(()),
        shape=(256, BLOCK),
        dtype=torch.float32,
    ).to(DEVICE)
    found = run_nf4([q], empty(256, BLOCK, dtype))
    expected = dynamic_map(q.device)[:, None] * torch.tensor(LEVELS, device=DEVICE).repeat(BLOCK // 16)
    assert_same_bits(found, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(3, 1, 2), (4, 8), (1, 1, 1, 1), (0, 2, 0, 3)], ids=str)
@pytest.mark.parametrize("columns", [2730, 1031, 64])
def test_nf4_parts_keep_their_own_absmax(rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
    parts = [quantize_nf4(random_weight(max(n, 1), columns, seed)) for seed, n in enumerate(rows)]
    assert len({float(q.offset) for q in parts}) == len(parts)
    expected = torch.cat([dequantize_nf4_reference(q, dtype)[:n] for q, n in zip(parts, rows, strict=True)])
    parts = [NF4Tensor(*tensors_of(q), (n, columns), dtype) for q, n in zip(parts, rows, strict=True)]
    assert_same_bits(run_nf4(parts, empty(sum(rows), columns, dtype)), expected)


@pytest.mark.parametrize(("columns", "start", "stop"), [(64, 300, 700), (4304, 4, 12), (4096, 7, 9)])
def test_nf4_rows_that_start_within_a_group_of_blocks(columns: int, start: int, stop: int) -> None:
    q = quantize_nf4(random_weight(stop, columns))
    first, last = start * columns // BLOCK, stop * columns // BLOCK
    assert first % 256 and start * columns % BLOCK == 0
    slice_ = NF4Tensor(
        q.codes[start * columns // 2 :],
        q.absmax_codes[first:last],
        q.absmax2[first // 256 :],
        q.offset,
        (stop - start, columns),
        torch.bfloat16,
    )
    found = run_nf4([slice_], empty(*slice_.shape, torch.bfloat16), first_block=first % 256)
    assert_same_bits(found, dequantize_nf4_reference(q, torch.bfloat16)[start:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 2730), (3, 67)], ids=str)
def test_nf4_unaligned_pointers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = quantize_nf4(random_weight(*shape))
    expected = dequantize_nf4_reference(q, dtype)
    assert_same_bits(run_nf4([q], unaligned(empty(*shape, dtype))), expected)
    q = NF4Tensor(unaligned(q.codes), unaligned(q.absmax_codes, 3), unaligned(q.absmax2), q.offset, shape, dtype)
    assert_same_bits(run_nf4([q], empty(*shape, dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=str)
def test_int8_equals_torch_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = quantize_int8(random_weight(*shape))
    q.codes.view(-1)[:1] = -128  # no quantiser writes it, files may hold it
    assert_same_bits(run_int8([q], empty(*shape, dtype)), dequantize_int8(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(3, 1, 2), (4, 8), (1, 1, 1, 1), (0, 2, 0, 3)], ids=str)
@pytest.mark.parametrize("columns", [2730, 1544])
def test_int8_parts_and_unaligned_pointers(rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
    parts = [quantize_int8(random_weight(max(n, 1), columns, seed)) for seed, n in enumerate(rows)]
    parts = [Int8Tensor(q.codes[:n], q.scale[:n], dtype) for q, n in zip(parts, rows, strict=True)]
    expected = torch.cat([dequantize_int8(q, dtype) for q in parts])
    assert_same_bits(run_int8(parts, empty(*expected.shape, dtype)), expected)
    moved = [Int8Tensor(unaligned(q.codes), unaligned(q.scale), dtype) for q in parts]
    assert_same_bits(run_int8(moved, empty(*expected.shape, dtype)), expected)
    assert_same_bits(run_int8(parts, unaligned(empty(*expected.shape, dtype))), expected)


@pytest.mark.parametrize("columns", [0, 64])
def test_nothing_is_launched_for_an_empty_matrix(columns: int) -> None:
    one, out = torch.ones(1, 1, device=DEVICE), empty(0, columns, torch.float32)
    nf4, int8 = quantize_nf4(one), quantize_int8(one)
    none = NF4Tensor(nf4.codes[:0], nf4.absmax_codes[:0], nf4.absmax2[:0], nf4.offset, (0, columns), torch.float32)
    assert run_nf4([none], out) is out
    assert run_int8([Int8Tensor(int8.codes[:0], int8.scale[:0], torch.float32)], out) is out


@counted
@pytest.mark.parametrize("reverse", [0, 1])
def test_the_order_of_threads_changes_nothing(reverse: int) -> None:
    emulator = library._emulated()[0]
    assert emulator is not None
    nf4, int8 = quantize_nf4(random_weight(5, 2730)), quantize_int8(random_weight(5, 1096))
    emulator.loaded.nibble_emulator_reverse(reverse)
    try:
        found = run_nf4([nf4], empty(5, 2730, torch.bfloat16)), run_int8([int8], empty(5, 1096, torch.bfloat16))
    finally:
        emulator.loaded.nibble_emulator_reverse(0)
    assert_same_bits(found[0], dequantize_nf4_reference(nf4, torch.bfloat16))
    assert_same_bits(found[1], dequantize_int8(int8, torch.bfloat16))


@counted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [2048, 2730])
def test_nf4_moves_each_byte_once(columns: int, dtype: torch.dtype) -> None:
    """Each code, absmax code and result once. absmax2 and offset, which all of a warp's lanes read at one address, from
    cache: 4 bytes for each lane and its block."""
    q = quantize_nf4(random_weight(24, columns))
    out = empty(24, columns, dtype)
    with library.counting() as accesses:
        run_nf4([q], out)
    moved = {x.tensor.data_ptr(): (x.loaded, x.loaded_distinct, x.stored, x.stored_distinct) for x in accesses}
    blocks = q.absmax_codes.numel()
    assert moved[q.codes.data_ptr()] == (q.codes.nbytes, q.codes.nbytes, 0, 0)
    assert moved[q.absmax_codes.data_ptr()] == (blocks, blocks, 0, 0)
    assert moved[q.absmax2.data_ptr()] == (4 * blocks, q.absmax2.nbytes, 0, 0)
    assert moved[q.offset.data_ptr()] == (4 * blocks, 4, 0, 0)
    assert moved[out.data_ptr()] == (0, 0, out.nbytes, out.nbytes)


@counted
@pytest.mark.parametrize("columns", [2048, 2056, 2730])
def test_int8_moves_each_byte_once(columns: int) -> None:
    """Codes and results once; the scale of a row once for each lane that reads it, at one address."""
    q = quantize_int8(random_weight(5, columns))
    out = empty(5, columns, torch.float16)
    with library.counting() as accesses:
        run_int8([q], out)
    moved = {x.tensor.data_ptr(): (x.loaded, x.loaded_distinct, x.stored, x.stored_distinct) for x in accesses}
    assert moved[q.codes.data_ptr()] == (q.codes.nbytes, q.codes.nbytes, 0, 0)
    assert moved[out.data_ptr()] == (0, 0, out.nbytes, out.nbytes)
    assert moved[q.scale.data_ptr()] == (5 * 32 * 4 * -(-columns // 1024), q.scale.nbytes, 0, 0)


@counted
def test_what_lies_outside_is_neither_read_nor_written() -> None:
    """One row too many, of the codes or of the output, is seen."""
    q = quantize_nf4(random_weight(4, 2048))
    longer = NF4Tensor(*tensors_of(q), (5, 2048), q.dtype)
    with pytest.raises(RuntimeError, match=r"dequantize_nf4<T>: .*a load of 4 bytes at .* is out of bounds"):
        run_nf4([longer], empty(5, 2048, torch.float16))
    with pytest.raises(RuntimeError, match=r"a store of 16 bytes at .* is out of bounds"):
        run_nf4([q], empty(4, 2048, torch.float16)[:3])
    int8 = quantize_int8(random_weight(4, 2048))
    with pytest.raises(RuntimeError, match=r"dequantize_int8<T>: .*a store of 16 bytes at .* is out of bounds"):
        run_int8([int8], empty(4, 2048, torch.float16)[:3])
    assert_same_bits(run_nf4([q], empty(4, 2048, torch.float16)), dequantize_nf4_reference(q, torch.float16))


@pytest.mark.parametrize("function", ["nibble_dequantize_nf4", "nibble_dequantize_int8"])
def test_wrong_arguments_are_refused(function: str) -> None:
    q, out = quantize_nf4(torch.ones(2, 64, device=DEVICE)), empty(2, 64, torch.float32)
    int8 = quantize_int8(torch.ones(2, 64, device=DEVICE))

    def call(count: int = 1, columns: int = 64, dtype: int = 0, shift: int = 0, rows: int = 2, odd: int = 0) -> None:
        if function.endswith("nf4"):
            pointers = [x.data_ptr() for x in tensors_of(q)]
            part: object = (library.NF4 * 1)(library.NF4(*pointers[:2], pointers[2] + odd, pointers[3], rows, 0))
        else:
            part = (library.Int8 * 1)(library.Int8(int8.codes.data_ptr(), int8.scale.data_ptr() + odd, rows))
        tensors = [out, *tensors_of(q), int8.codes, int8.scale]
        library.call(function, tensors, part, count, columns, out.data_ptr() + shift, dtype)

    call()
    for count in (0, 5):
        with pytest.raises(RuntimeError, match="the number of parts is not 1 to 4"):
            call(count=count)
    with pytest.raises(RuntimeError, match="dtype"):
        call(dtype=3)
    for wrong in ({"columns": -1}, {"rows": -1}, {"rows": 1 << 44}):
        with pytest.raises(RuntimeError, match="rows, columns or first_block are negative, or more than one launch"):
            call(**wrong)
    for wrong in ({"shift": 1}, {"odd": 2}):
        with pytest.raises(RuntimeError, match="not aligned to its element"):
            call(**wrong)
