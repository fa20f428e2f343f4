"""Unpacking NF4: the same bits from torch's rule, csrc and bitsandbytes, and who is chosen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dequantize_nf4 as module
from kernels import dispatch, library
from kernels.dequantize_nf4 import dequantize_nf4, dequantize_nf4_reference, unpack_nf4
from kernels.dispatch import BackendError, set_backend
from kernels.nf4 import concatenate_nf4, quantize_nf4
from tests.kernels.packed import csrc as csrc
from tests.kernels.packed import nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 5), (1, 65), (9, 2730), (5, 4304), (129, 256)]
FOREIGN = "bitsandbytes"


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nothing was chosen."""
    monkeypatch.setattr(dispatch, "_settings", {})
    monkeypatch.setattr(dispatch, "_decisions", {})
    for name in ("NIBBLE_KERNELS", "NIBBLE_EMULATE"):
        monkeypatch.delenv(name, raising=False)
    yield


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> Any:
    """What a choice needs of a tensor on a GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_csrc_has_the_bits_of_the_reference(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    q = quantize_nf4((torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]).to(device))
    assert torch.equal(dequantize_nf4(q, dtype), dequantize_nf4_reference(q, dtype))


@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("parts", [1, 3, 4, 6])
def test_fused_parts_lie_under_each_other(parts: int, device: torch.device) -> None:
    """Rows of whole weights too, whose first block is not the first of its group; more than one launch takes 6."""
    torch.manual_seed(parts)
    each = [nf4(400, 64, torch.float16, device).rows(100 + 3 * i, 350 - i) for i in range(parts)]
    assert any(part.first_block for part in each)
    fused = dequantize_nf4(concatenate_nf4(each))
    assert torch.equal(fused, torch.cat([dequantize_nf4_reference(part, torch.float16) for part in each]))


@pytest.mark.usefixtures("csrc")
def test_unpacking_counts_as_writing(device: torch.device) -> None:
    """So that autograd refuses a matrix that it saved and that was written over."""
    q = nf4(4, 64, torch.float32, device)
    x, buffer = torch.ones(4, 64, device=device, requires_grad=True), torch.ones(4, 64, device=device)
    y = x * buffer
    unpack_nf4((q,), buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fp64_is_the_reference_even_where_it_is_slow(auto: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available_for", lambda _: "csrc is not built")
    monkeypatch.setattr(module, "_bitsandbytes", lambda: None)
    assert module.backend_of(on_gpu(torch.float64)) == "reference"


def test_auto_on_a_gpu_is_csrc_then_bitsandbytes_then_an_error(
    auto: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = [""]
    monkeypatch.setattr(library, "available_for", lambda _: missing[0])
    monkeypatch.setattr(module, "_bitsandbytes", object)
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        assert module.backend_of(on_gpu()) == "cuda"
        missing[0] = "csrc is not built"
        assert module.backend_of(on_gpu()) == "bitsandbytes"
    assert [record.getMessage() for record in caplog.records] == [
        "dequantize_nf4: cuda (CUDA tensor)",
        "dequantize_nf4: bitsandbytes (csrc is not built)",
    ]
    monkeypatch.setattr(module, "_bitsandbytes", lambda: None)
    with pytest.raises(BackendError, match=r"csrc is not built; bitsandbytes with CUDA is missing; build csrc"):
        module.backend_of(on_gpu())
    set_backend("reference")
    assert module.backend_of(on_gpu()) == "reference"


def test_an_explicit_backend_never_falls_back(auto: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_backend("cuda")
    with pytest.raises(BackendError, match=r"'cuda' .*a CPU tensor needs NIBBLE_EMULATE=1\); accepted here: auto, ref"):
        dequantize_nf4(quantize_nf4(torch.ones(4, 4)))
    monkeypatch.setattr(library, "available_for", lambda _: "csrc is not built")
    monkeypatch.setattr(module, "_bitsandbytes", object)
    with pytest.raises(BackendError, match=r"\(csrc is not built\); accepted here: auto, reference"):
        module.backend_of(on_gpu())


def test_the_cpu_emulates_only_where_it_is_told(auto: None, csrc: None) -> None:
    set_backend("auto")
    if not torch.cuda.is_available():
        assert module.backend_of(torch.empty(0)) == "cuda"
        assert module.backend_of(torch.empty(0, dtype=torch.float64)) == "reference"


def test_importing_bitsandbytes_does_not_talk_about_our_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in that does on its import what the real one does on CPUs with AVX-512; its other warnings are shown."""
    backend = tmp_path / FOREIGN / "backends" / "cpu"
    backend.mkdir(parents=True)
    (tmp_path / FOREIGN / "__init__.py").write_text("from .backends.cpu import ops")
    (tmp_path / FOREIGN / "functional.py").touch()
    (tmp_path / FOREIGN / "cextension.py").write_text("class lib:\n    compiled_with_cuda = True\n")
    (backend / "ops.py").write_text(
        "import logging\n"
        "logger = logging.getLogger(__name__)\n"
        "try:\n    from kernels import get_kernel\n"
        "except Exception as error:\n    logger.warning('no kernel: %s', error)\n"
        "logger.warning('something else')\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == FOREIGN]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    module._bitsandbytes.cache_clear()
    try:
        assert module._bitsandbytes().__file__ == str(tmp_path / FOREIGN / "functional.py")
    finally:
        module._bitsandbytes.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == FOREIGN]:
            del sys.modules[name]  # the real ones, if they were there, come back at the end of the test
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").filters == []


def fallback(q: Any, dtype: torch.dtype) -> Tensor:
    parts = module.parts_of(q)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for part, rows in zip(parts, out.split([part.shape[0] for part in parts]), strict=True):
        module._unpack_with_bitsandbytes(part, rows)
    return out


def test_bitsandbytes_fallback_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no first_block. By its CPU kernels, which write into no tensor that they are given."""
    functional: Any = pytest.importorskip("bitsandbytes.functional")

    def dequantize_4bit(codes: Tensor, absmax: Tensor, out: Tensor, blocksize: int, quant_type: str) -> None:
        op = torch.ops.bitsandbytes.dequantize_4bit.default
        out.copy_(op(codes, absmax, blocksize, quant_type, out.shape, out.dtype))

    on_the_cpu = SimpleNamespace(dequantize_blockwise=functional.dequantize_blockwise, dequantize_4bit=dequantize_4bit)
    monkeypatch.setattr(module, "_bitsandbytes", lambda: on_the_cpu)
    cpu = torch.device("cpu")
    fused = concatenate_nf4([nf4(400, 64, torch.float32, cpu).rows(100 + 4 * i, 348 - i) for i in range(3)])
    assert [part.first_block for part in fused.parts] == [100, 104, 108]
    assert torch.equal(fallback(fused, torch.float32), dequantize_nf4_reference(fused, torch.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_kernels_have_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    if module._bitsandbytes() is None:
        pytest.skip("bitsandbytes with CUDA is missing")
    torch.manual_seed(8)
    device = torch.device("cuda")
    for shape in SHAPES:
        q = nf4(*shape, dtype, device)
        assert torch.equal(fallback(q, dtype), dequantize_nf4_reference(q, dtype)), shape
    fused = concatenate_nf4([nf4(400, 64, dtype, device).rows(100 + 3 * i, 350 - i) for i in range(3)])
    assert torch.equal(fallback(fused, dtype), dequantize_nf4_reference(fused, dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("csrc")
def test_random_shapes_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        rows, columns = (int(torch.randint(1, most, (), generator=generator)) for most in (300, 6000))
        for dtype in DTYPES:
            q = nf4(rows, columns, dtype, torch.device("cuda"))
            assert torch.equal(dequantize_nf4(q), dequantize_nf4_reference(q, dtype)), (rows, columns)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    q = nf4(65, 4304, dtype, torch.device("cpu"))
    there = dequantize_nf4_reference(q.to("cuda"), dtype).cpu()
    assert torch.equal(there, dequantize_nf4_reference(q, dtype))
