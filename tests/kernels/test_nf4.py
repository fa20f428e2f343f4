"""NF4 against bitsandbytes, its format's oracle, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import nf4
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.nf4 import NF4Tensor, concatenate_nf4, quantize_nf4

functional: Any = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bitsandbytes_of(weight: Tensor) -> tuple[Tensor, Any]:
    return functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def bitsandbytes_dequantized(packed: Tensor, state: Any, shape: torch.Size) -> Tensor:
    """As one row: with AVX-512 bitsandbytes 0.50 restarts its blocks at rows whose length is 16 k but not 64 k."""
    state.shape = torch.Size((1, shape.numel()))
    with torch.compiler.set_stance("force_eager"):  # odd sizes go through a function it would compile
        result: Tensor = functional.dequantize_4bit(packed, state)
    return result.reshape(shape)


def assert_equals_bitsandbytes(weight: Tensor) -> None:
    packed, state = bitsandbytes_of(weight)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.codes, packed.view(-1))
    assert torch.equal(ours.absmax_codes, state.absmax)
    assert torch.equal(ours.absmax2, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(dequantize_nf4(ours), bitsandbytes_dequantized(packed, state, weight.shape))


def test_tables_are_bitsandbytes_own() -> None:
    cpu = torch.device("cpu")
    assert torch.equal(nf4.dynamic_map(cpu), functional.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.LEVELS), functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_thousand_blocks_of_many_scales(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    low, high = (-7, 4) if dtype == torch.float16 else (-30, 30)
    weight = torch.randn(10_000, 64) * torch.logspace(low, high, 10_000)[torch.randperm(10_000), None]
    assert_equals_bitsandbytes(weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (3, 5), (1, 65), (7, 2730), (5, 4304), (257, 729), (640, 688)])
def test_any_shape(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    assert_equals_bitsandbytes((torch.randn(shape) * 0.02).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_constant_and_partly_zero_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    assert_equals_bitsandbytes(torch.zeros(9, 100, dtype=dtype))
    assert_equals_bitsandbytes(torch.full((9, 100), -0.5, dtype=dtype))
    weight = torch.randn(640, 100).to(dtype)
    weight[100:500] = 0
    weight[:, 7] = 0
    assert_equals_bitsandbytes(weight)


@pytest.mark.parametrize("scale", [1e-37, 1e-38, 1e-40, 1e-44])
def test_denormals(scale: float) -> None:
    torch.manual_seed(3)
    assert_equals_bitsandbytes(torch.randn(33, 100) * scale)


def test_fp16_denormals() -> None:
    torch.manual_seed(3)
    assert_equals_bitsandbytes((torch.randn(33, 100) * 1e-7).half())


def test_values_on_and_beside_the_bounds() -> None:
    bounds = nf4._level_bounds(torch.device("cpu"))
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    for scale in (1.0, 0.3, 7.0):
        row = torch.cat([torch.ones(1), bounds, bounds.nextafter(up), bounds.nextafter(down), torch.zeros(18)])
        assert_equals_bitsandbytes((row * scale).repeat(5, 1))


def test_bounds_in_a_short_block() -> None:
    """The last block divides where full blocks multiply by the reciprocal."""
    torch.manual_seed(9)
    bounds = nf4._level_bounds(torch.device("cpu"))
    for scale in torch.rand(200) + 0.5:
        row = torch.cat([torch.ones(1), bounds]) * scale
        assert_equals_bitsandbytes(torch.cat([row, row.nextafter(torch.tensor(9.0))[1:]])[None])


def test_the_steps_of_the_absmax_codes() -> None:
    """Differences that fall on, and one ulp beside, each of the 65,536 steps that bitsandbytes looks up."""
    middle = (torch.arange(65536, dtype=torch.float64) - 0.5) / 32767.5 - 1.0
    values = torch.cat([middle, middle + 2**-24, middle - 2**-24]).float().clamp(-1, 1)
    values[::256] = 1.0  # absmax2 of its block
    codes, absmax2 = nf4._quantize_absmax(values)
    theirs, state = functional.quantize_blockwise(values, blocksize=256)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax2, state.absmax)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    weight = torch.randn(33, 729)
    whole = quantize_nf4(weight)
    values = dequantize_nf4(whole)
    monkeypatch.setattr(nf4, "CHUNK_CPU", 256)
    monkeypatch.setattr(nf4, "CHUNK2", 256)
    pieces = quantize_nf4(weight)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.absmax_codes, whole.absmax_codes)
    assert torch.equal(dequantize_nf4(whole), values)


def test_strided_weight_equals_its_copy() -> None:
    torch.manual_seed(5)
    weight = torch.randn(96, 130).T[::2]
    assert torch.equal(dequantize_nf4(quantize_nf4(weight)), dequantize_nf4(quantize_nf4(weight.contiguous())))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizes_to_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    q = quantize_nf4(torch.randn(40, 100))
    assert dequantize_nf4(q).dtype == torch.float32
    assert torch.equal(dequantize_nf4(q, dtype), dequantize_nf4(q, torch.float32).to(dtype))


def test_error_is_that_of_four_bits() -> None:
    torch.manual_seed(7)
    weight = torch.randn(256, 512)
    absmax = weight.view(-1, 64).abs().amax(1, keepdim=True)
    error = (dequantize_nf4(quantize_nf4(weight)) - weight).view(-1, 64).abs()
    assert (error <= absmax * 0.17).all()  # half of the widest gap between levels, and the absmax's own 8 bits


def test_size_and_device() -> None:
    q = quantize_nf4(torch.randn(64, 1024, dtype=torch.float16))
    blocks = 64 * 1024 // 64
    assert q.nbytes == 64 * 512 + blocks + 4 * (blocks // 256) + 4
    moved = q.to("meta")
    assert isinstance(moved, NF4Tensor)
    assert moved.device.type == moved.offset.device.type == "meta"
    assert (moved.shape, moved.dtype) == ((64, 1024), torch.float16)


@pytest.mark.parametrize("columns", [64, 96, 128, 729, 2730])
def test_rows_are_views_with_the_values_of_the_whole(columns: int) -> None:
    torch.manual_seed(10)
    q = quantize_nf4(torch.randn(640, columns))
    values = dequantize_nf4(q)
    for start, stop in ((0, 640), (64, 128), (320, 640), (576, 640)):
        rows = q.rows(start, stop)
        assert rows.shape == (stop - start, columns)
        assert torch.equal(dequantize_nf4(rows), values[start:stop])
        for name in ("codes", "absmax_codes", "absmax2", "offset"):
            whole, part = getattr(q, name), getattr(rows, name)
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), name
    again = q.rows(64, 512).rows(192, 256)
    assert 0 <= again.first_block < 256
    assert torch.equal(dequantize_nf4(again), values[256:320])


def test_the_last_row_may_end_inside_a_block() -> None:
    q = quantize_nf4(torch.randn(67, 729))
    values = dequantize_nf4(q)
    assert torch.equal(dequantize_nf4(q.rows(64, 67)), values[64:])
    assert torch.equal(dequantize_nf4(q.rows(64, 67).rows(0, 3)), values[64:])


@pytest.mark.parametrize(("columns", "multiple"), [(729, 64), (2730, 32), (96, 2), (48, 4)])
def test_rows_that_cut_a_block_are_refused(columns: int, multiple: int) -> None:
    q = quantize_nf4(torch.randn(192, columns))
    assert q.rows(0, multiple).shape == (multiple, columns)
    for start, stop in ((0, multiple // 2), (multiple // 2, 192), (1, 192)):
        with pytest.raises(ValueError, match=f"with {columns} columns the bounds must be multiples of {multiple} rows"):
            q.rows(start, stop)
    for start, stop in ((0, 0), (64, 0), (-64, 64), (128, 256)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} of a NF4 weight with 192 rows"):
            q.rows(start, stop)


def test_shards_are_the_weight() -> None:
    q = quantize_nf4(torch.randn(384, 96))
    for world in (1, 2, 3, 64):
        shards = [q.shard_rows(rank, world) for rank in range(world)]
        assert {shard.shape for shard in shards} == {(384 // world, 96)}
        assert torch.equal(torch.cat([dequantize_nf4(shard) for shard in shards]), dequantize_nf4(q))
    for world in (5, 128, 384):  # unequal, and inside of blocks
        with pytest.raises(ValueError, match=f"in {world} equal shares of rows: .* must be a multiple of 2"):
            q.shard_rows(0, world)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        q.shard_rows(2, 2)
    assert quantize_nf4(torch.randn(3, 5)).shard_rows(0, 1).shape == (3, 5)


def test_fused_weights_keep_their_own_scales() -> None:
    torch.manual_seed(11)
    parts = [quantize_nf4(torch.randn(rows, 96) * scale) for rows, scale in ((5, 1.0), (64, 1e-3), (2, 30.0))]
    parts[1] = parts[1].rows(2, 64)
    fused = concatenate_nf4(parts)
    assert (fused.shape, fused.dtype, fused.device) == ((69, 96), torch.float32, torch.device("cpu"))
    assert fused.nbytes == sum(part.nbytes for part in parts)
    assert all(a is b for a, b in zip(fused.parts, parts, strict=True))
    assert torch.equal(dequantize_nf4(fused), torch.cat([dequantize_nf4(part) for part in parts]))
    moved = fused.to("meta")
    assert moved.device.type == "meta" and moved.shape == fused.shape and moved.parts[1].first_block == 3


@pytest.mark.parametrize("other", [(4, 95, torch.float32), (4, 96, torch.float16)])
def test_what_cannot_be_fused_is_refused(other: tuple[int, int, torch.dtype]) -> None:
    *shape, dtype = other
    first, second = quantize_nf4(torch.randn(4, 96)), quantize_nf4(torch.randn(shape).to(dtype))
    with pytest.raises(ValueError, match=r"equal columns, dtype and device, got \(4, 96\) torch.float32 on cpu, \("):
        concatenate_nf4([first, second])
    with pytest.raises(ValueError, match="got none"):
        concatenate_nf4([])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [(0, 0), (4, 60), (6, 99)])
def test_non_finite_weight_is_named(value: float, index: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "CHUNK_CPU", 128)
    weight = torch.randn(7, 100)
    weight[index] = value
    with pytest.raises(ValueError, match=rf"layers\.3\.q\.weight: value {value} at \[{index[0]}, {index[1]}\]"):
        quantize_nf4(weight, "layers.3.q.weight")


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4, dtype=torch.int32), torch.zeros(8), torch.zeros(0, 4), torch.zeros(2, 2).double()]
)
def test_what_is_not_a_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="head: NF4 takes"):
        quantize_nf4(weight, "head")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    weight = torch.randn(65, 4304).to(dtype)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    for name in ("codes", "absmax_codes", "absmax2", "offset"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
