"""NF4 against bitsandbytes, its format's oracle, bit for bit."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dequantize_nf4 as unpacking
from kernels import nf4
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.dispatch import BackendError, set_backend
from kernels.nf4 import NF4Tensor, quantize_nf4

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


def test_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.uint8, device=torch.device("cuda"))
    previous = set_backend("cuda")
    try:
        with pytest.raises(BackendError, match=r"dequantize_nf4: backend 'cuda' .*torch\.uint8 tensor on cpu"):
            dequantize_nf4(quantize_nf4(torch.ones(4, 4)))
        monkeypatch.setattr(unpacking, "_bitsandbytes", lambda: None)
        with pytest.raises(BackendError, match="bitsandbytes with CUDA is missing"):
            unpacking._backend(on_gpu)
        monkeypatch.setattr(unpacking, "_bitsandbytes", lambda: functional)
        assert unpacking._backend(on_gpu) == "cuda"
        set_backend("reference")
        assert unpacking._backend(on_gpu) == "reference"
    finally:
        set_backend(previous)


def test_importing_bitsandbytes_does_not_talk_about_our_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in that does on its import what the real one does on CPUs with AVX-512; its other warnings are shown."""
    backend = tmp_path / "bitsandbytes" / "backends" / "cpu"
    backend.mkdir(parents=True)
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("from .backends.cpu import ops")
    (tmp_path / "bitsandbytes" / "functional.py").touch()
    (tmp_path / "bitsandbytes" / "cextension.py").write_text("class lib:\n    compiled_with_cuda = True\n")
    (backend / "ops.py").write_text(
        "import logging\n"
        "logger = logging.getLogger(__name__)\n"
        "try:\n    from kernels import get_kernel\n"
        "except Exception as error:\n    logger.warning('no kernel: %s', error)\n"
        "logger.warning('something else')\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    unpacking._bitsandbytes.cache_clear()
    try:
        assert unpacking._bitsandbytes().__file__ == str(tmp_path / "bitsandbytes" / "functional.py")
    finally:
        unpacking._bitsandbytes.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            monkeypatch.delitem(sys.modules, name)  # the real ones come back with the others
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").filters == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    weight = torch.randn(65, 4304).to(dtype)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    for name in ("codes", "absmax_codes", "absmax2", "offset"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
    values = dequantize_nf4(here)
    assert torch.equal(unpacking.dequantize_nf4_reference(there, dtype).cpu(), values)
    if unpacking._bitsandbytes() is not None:
        assert torch.equal(unpacking._dequantize_bitsandbytes(there, dtype).cpu(), values)
