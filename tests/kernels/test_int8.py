from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch, library, nf4
from kernels.int8 import backend_of, dequantize_int8, dequantize_int8_reference, quantize_int8, unpack_int8
from tests.kernels.packed import csrc as csrc
from tests.kernels.packed import int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (127, 2730), (33, 4304)])
def test_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]).to(dtype)
    weight[weight.abs().amax(1) == 0] = 1
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    q = quantize_int8(weight)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.scale, scale)
    assert torch.equal(dequantize_int8(q, torch.float32), functional.int8_vectorwise_dequant(codes, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(50, 300).to(dtype).float()
    error = (dequantize_int8(quantize_int8(weight.to(dtype)), torch.float32) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_zero_and_denormal_rows_are_harmless() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-45], [1e-37, -1e-37], [1.0, -0.5]])
    q = quantize_int8(weight)
    assert q.codes[0].tolist() == [0, 0]
    assert torch.allclose(dequantize_int8(q), weight, rtol=0.01, atol=1e-36)


@pytest.mark.usefixtures("csrc")
def test_strided_weight_equals_its_copy(device: torch.device) -> None:
    weight = torch.randn(64, 40, device=device).T
    q, copy = quantize_int8(weight), quantize_int8(weight.contiguous())
    assert torch.equal(q.codes, copy.codes) and q.codes.is_contiguous()
    assert torch.equal(dequantize_int8(q), dequantize_int8(copy))


def test_groups_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 50) * torch.rand(37, 1)
    whole = quantize_int8(weight)
    monkeypatch.setattr(nf4, "CHUNK_CPU", 256)
    pieces = quantize_int8(weight)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scale, pieces.scale)


def test_size_and_device() -> None:
    q = quantize_int8(torch.randn(10, 30, dtype=torch.bfloat16))
    assert (q.nbytes, q.shape, q.dtype) == (10 * 30 + 40, (10, 30), torch.bfloat16)
    assert q.to("meta").device.type == q.to("meta").scale.device.type == "meta"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named(value: float) -> None:
    weight = torch.randn(4, 6)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=rf"q\.weight: value {value} at \[2, 5\]"):
        quantize_int8(weight, "q.weight")


@pytest.mark.parametrize("weight", [torch.zeros(4, 4).long(), torch.zeros(8), torch.zeros(4, 0)])
def test_what_is_not_a_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="head: int8 takes"):
        quantize_int8(weight, "head")


@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 2730), (5, 4304), (129, 256)])
def test_csrc_has_the_bits_of_the_reference(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(2)
    q = quantize_int8((torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]).to(device))
    assert torch.equal(dequantize_int8(q, dtype), dequantize_int8_reference(q, dtype))


@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("parts", [1, 4, 6])
def test_weights_are_unpacked_under_each_other(parts: int, device: torch.device) -> None:
    torch.manual_seed(parts)
    each = [int8(9 + i, 72, torch.float16, device).rows(i, 9) for i in range(parts)]
    out = torch.empty(sum(q.shape[0] for q in each), 72, dtype=torch.float16, device=device)
    unpack_int8(each, out)
    assert torch.equal(out, torch.cat([dequantize_int8_reference(q, torch.float16) for q in each]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("csrc")
def test_random_shapes_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        rows, columns = (int(torch.randint(1, most, (), generator=generator)) for most in (300, 6000))
        for dtype in DTYPES:
            q = int8(rows, columns, dtype, torch.device("cuda"))
            assert torch.equal(dequantize_int8(q), dequantize_int8_reference(q, dtype)), (rows, columns)


def test_a_gpu_without_csrc_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_settings", {"backend": "auto"})
    monkeypatch.setattr(library, "available_for", lambda _: "csrc is not built")
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))
    assert backend_of(on_gpu) == "reference"
    monkeypatch.setattr(library, "available_for", lambda _: "")
    assert backend_of(on_gpu) == "cuda"


def test_rows_are_views_with_the_values_of_the_whole() -> None:
    q = quantize_int8(torch.randn(7, 5))
    rows = q.rows(2, 6)
    assert rows.shape == (4, 5) and rows.codes.data_ptr() == q.codes[2:].data_ptr()
    assert torch.equal(dequantize_int8(rows), dequantize_int8(q)[2:6])
    for start, stop in ((0, 0), (3, 2), (-1, 2), (0, 8)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} of an int8 weight with 7 rows"):
            q.rows(start, stop)
