"""kernels/library.py: csrc's functions take tensors, say what they were built from, and refuse what they cannot do."""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csrc import build
from csrc.build import Built
from kernels import library
from kernels.dispatch import as_on_card
from kernels.int8 import Int8Tensor, dequantize_int8_reference, quantize_int8
from kernels.launches import MOST_FEW_ROWS

ROOT = Path(__file__).parents[2]
HEADER = (ROOT / "csrc/nibble.h").read_text()
STRUCTS = {"nibble_nf4": library.NF4, "nibble_int8": library.Int8, "nibble_output": library.Output}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is loaded for CUDA tensors yet, and CPU tensors are taken."""
    monkeypatch.setenv("NIBBLE_EMULATE", "1")
    library._cuda.cache_clear()
    library._uncovered.cache_clear()
    yield
    library._cuda.cache_clear()
    library._uncovered.cache_clear()


@pytest.fixture
def packed() -> Int8Tensor:
    return quantize_int8(torch.randn(5, 96, generator=torch.Generator().manual_seed(0)))


def unpack(q: Int8Tensor, out: Tensor, *named: Tensor, count: int = 1) -> None:
    part = (library.Int8 * 1)((q.codes.data_ptr(), q.scale.data_ptr(), q.shape[0]))
    tensors = named or (out, q.codes, q.scale)
    library.call(
        "nibble_dequantize_int8", tensors, part, count, q.shape[1], out.data_ptr(), library.DTYPES[out.dtype]
    )  # fmt: skip


def test_structs_and_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    """As the compiler lays them out."""
    lines = [f'printf("%zu ", sizeof({name}));' for name in STRUCTS]
    fields = [(name, field[0]) for name, struct in STRUCTS.items() for field in struct._fields_]
    lines += [f'printf("%zu ", offsetof({name}, {field}));' for name, field in fields]
    numbers = ("NIBBLE_FP32", "NIBBLE_FP16", "NIBBLE_BF16", "NIBBLE_MAX_PARTS", "NIBBLE_MAX_TOKENS")
    lines += [f'printf("%d ", int({name}));' for name in numbers]
    source = tmp_path / "layout.cpp"
    head = '#include <cstddef>\n#include <cstdio>\n#include "nibble.h"\n'
    source.write_text(head + "int main() {" + "\n".join(lines) + "}")
    program = tmp_path / "layout"
    cxx = build.find_cxx()
    assert cxx is not None
    subprocess.run([cxx, "-I", ROOT / "csrc", source, "-o", program], check=True)
    said = list(map(int, subprocess.run([program], capture_output=True, check=True).stdout.split()))
    ours = [ctypes.sizeof(struct) for struct in STRUCTS.values()]
    ours += [getattr(STRUCTS[name], field).offset for name, field in fields]
    ours += [*library.DTYPES.values(), library.MAX_PARTS, MOST_FEW_ROWS]
    assert said == ours


@pytest.mark.parametrize("name", library.FUNCTIONS)
def test_arguments_are_those_of_the_header(name: str) -> None:
    declared = re.search(rf"int {name}\(([^)]*)\)", HEADER)
    assert declared is not None
    kinds = {
        "int": ctypes.c_int, "int64_t": ctypes.c_int64,
        "const void*": ctypes.c_void_p, "void*": ctypes.c_void_p, "float*": ctypes.c_void_p,
    } | {f"const struct {name}*": ctypes.POINTER(struct) for name, struct in STRUCTS.items()}  # fmt: skip
    types = [argument.strip().rpartition(" ")[0] for argument in declared[1].split(",")]
    assert library.FUNCTIONS[name] == [kinds[each] for each in types]


def test_a_function_takes_tensors(packed: Int8Tensor) -> None:
    for dtype in library.DTYPES:
        out = torch.empty(5, 96, dtype=dtype)
        unpack(packed, out)
        assert torch.equal(out, dequantize_int8_reference(packed, dtype))


def test_a_status_is_an_error_in_words(packed: Int8Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"nibble_dequantize_int8: the number of parts is not 1 to 4 \(status -1\)"):
        unpack(packed, torch.empty(5, 96), count=5)


def test_memory_that_was_not_named_is_not_touched(packed: Int8Tensor) -> None:
    """In the emulator, which forgets it for the next call."""
    out = torch.empty(5, 96)
    with pytest.raises(RuntimeError, match="out of bounds"):
        unpack(packed, out, out, packed.codes)
    unpack(packed, out)
    with pytest.raises(RuntimeError, match="out of bounds"):
        unpack(packed, out, out, packed.codes, packed.scale[:4])


def test_nothing_runs_without_data(packed: Int8Tensor) -> None:
    out = torch.full((5, 96), 7.0)
    with as_on_card(90):
        unpack(packed, out)
    assert bool((out == 7).all())
    meta = torch.empty(5, 96, device="meta")
    library.call("nibble_dequantize_int8", [meta])


def test_who_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1)
    assert library.available_for(x) == ""
    assert "meta" in library.available_for(x.to("meta"))
    monkeypatch.delenv("NIBBLE_EMULATE")
    assert library.available_for(x) == "a CPU tensor needs NIBBLE_EMULATE=1"
    with pytest.raises(RuntimeError, match="NIBBLE_EMULATE=1"):
        library.call("nibble_dequantize_int8", [x])


def test_bytes_are_counted(packed: Int8Tensor) -> None:
    out = torch.empty(5, 96, dtype=torch.float16)
    with library.counting() as accesses:
        unpack(packed, out)
        unpack(packed, out)
    counts = {id(each.tensor): each for each in accesses}
    written, codes = counts[id(out)], counts[id(packed.codes)]
    assert (written.loaded, written.stored, written.stored_distinct) == (0, 2 * out.nbytes, out.nbytes)
    assert (codes.loaded, codes.loaded_distinct, codes.stored) == (2 * 480, 480, 0)
    assert len(accesses) == 3


def test_tensors_that_overlap_are_one_range() -> None:
    both = torch.zeros(3, 10)
    left, right, other = both[:, :4], both[:, 4:], torch.zeros(2)
    ranges = {(start, end) for start, end, _ in library._ranges([right, other, left, torch.empty(0)])}
    start = both.data_ptr()
    assert ranges == {(start, start + both.nbytes), (other.data_ptr(), other.data_ptr() + 8)}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where this checkout's library and the wheel's would be: nothing is there yet."""
    checkout, wheel = tmp_path / "build/libnibble.so", tmp_path / "site/nibble_csrc/libnibble.so"
    for path in (checkout, wheel):
        path.parent.mkdir(parents=True)
    wheel.with_name("__init__.py").touch()
    monkeypatch.setattr(build, "LIBRARY", checkout)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    return checkout, wheel


def describe(path: Path, sources: str) -> None:
    about = f'{{"sources": "{sources}", "archs": [80], "ptx": 80, "compiler": "CUDA 12.8"}}'
    path.write_bytes(b"ELF" + build.MARK + about.encode() + b"\0")


def test_where_the_library_is_found(libraries: tuple[Path, Path]) -> None:
    checkout, wheel = libraries
    ours = build.sources_hash()
    assert library.found() is None
    assert "csrc is not built: make, with nvcc" in library.missing()
    library._cuda.cache_clear()
    describe(checkout, "of last year")
    assert library.found() is None
    assert library.missing() == f"{checkout} was built from other sources: make, with nvcc"
    describe(wheel, ours)
    assert library.found() == (wheel, Built(ours, (80,), 80, "CUDA 12.8"))
    describe(checkout, ours)
    found = library.found()
    assert found is not None and found[0] == checkout


def test_a_library_that_does_not_load_is_said(libraries: tuple[Path, Path]) -> None:
    describe(libraries[0], build.sources_hash())
    assert library.missing().startswith(f"{libraries[0]} cannot be loaded: ")


def test_a_library_that_lies_about_its_sources_is_not_used(libraries: tuple[Path, Path]) -> None:
    """The loader returns what it has loaded from this path before."""
    source = libraries[0].with_suffix(".cpp")
    names = "".join(f'extern "C" int {name}() {{ return 0; }}' for name in [*library.FUNCTIONS, "nibble_error"])
    source.write_text(f'extern "C" const char* nibble_sources() {{ return "others"; }} {names}')
    cxx = build.find_cxx()
    assert cxx is not None
    subprocess.run([cxx, "-shared", "-fPIC", source, "-o", libraries[0]], check=True)
    with libraries[0].open("ab") as file:
        about = f'{{"sources": "{build.sources_hash()}", "archs": [], "ptx": 0, "compiler": "CUDA 12.8"}}'
        file.write(build.MARK + about.encode() + b"\0")
    assert "was replaced after this process had loaded it" in library.missing()


def test_a_driver_that_is_too_old_is_said(libraries: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuDriverGetVersion(self, version: ctypes._Pointer[ctypes.c_int]) -> int:  # noqa: N802 (the driver's name)
            ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = 12040
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert library._too_old_driver(Built("", (80,), 80, "CUDA 12.8")) == ""
    why = library._too_old_driver(Built("", (80,), 80, "CUDA 13.0"))
    assert why == "needs CUDA 13.0, the driver has 12.4: update it, or build with an older nvcc"


def test_a_card_that_the_library_was_not_built_for_is_said(
    libraries: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(libraries[0], build.sources_hash())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "was built for CUDA 12.8, sm_80, this GPU is sm_75" in library._uncovered(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    library._uncovered.cache_clear()
    assert library._uncovered(0) == ""  # from PTX


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_current_stream_and_device_of_the_tensor(packed: Int8Tensor) -> None:
    if library.missing():
        pytest.skip(library.missing())
    for index in range(torch.cuda.device_count()):
        q = packed.to(f"cuda:{index}")
        out = torch.empty(5, 96, device=f"cuda:{index}")
        stream = torch.cuda.Stream(device=index)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            unpack(q, out)
            assert not stream.query()  # it waits behind the sleeping kernel, and the call does not wait for it
        stream.synchronize()
        assert torch.equal(out.cpu(), dequantize_int8_reference(packed, torch.float32))
        assert torch.cuda.current_device() == 0
        out.zero_()
        torch.cuda.synchronize(index)
        thread = threading.Thread(target=unpack, args=(q, out))  # has no device yet, as one of autograd's may have none
        thread.start()
        thread.join()
        torch.cuda.synchronize(index)
        assert torch.equal(out.cpu(), dequantize_int8_reference(packed, torch.float32))
