"""What nvcc makes of the kernels whose speed hangs on the order of their loads; the emulator cannot see it."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from csrc import build

Kernel = list[str]  # its instructions, without predicates
ORDERED_BY = "release 13.0"  # the nvcc whose order is looked at: another one may find another good one


def cuobjdump() -> str | None:
    """Of the CUDA toolkit, or of triton's package."""
    try:
        import triton

        packaged = Path(triton.__file__).parent / "backends/nvidia/bin"
    except ImportError:
        packaged = Path()
    nvcc = build.find_nvcc()
    toolkit = nvcc.resolve().parent if nvcc else Path()
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in (None, str(toolkit), str(packaged)))), None)


@pytest.fixture(params=[80, 86, 90])
def arch(request: pytest.FixtureRequest) -> int:
    nvcc = build.find_nvcc()
    if nvcc is None or cuobjdump() is None or request.param not in build.known_archs(nvcc):
        pytest.skip("needs nvcc and cuobjdump")
    return int(request.param)


@pytest.fixture
def _this_nvcc(arch: int) -> None:
    said = subprocess.run([str(build.find_nvcc()), "--version"], check=True, capture_output=True, text=True).stdout
    if ORDERED_BY not in said:
        pytest.skip(f"the order is that of nvcc's {ORDERED_BY}")


@cache
def kernels(source: str, arch: int) -> dict[str, Kernel]:
    """By mangled name."""
    with TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        line = [str(build.find_nvcc()), *build.FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", cubin]
        subprocess.run([*line, str(build.FOLDER / source)], check=True)
        listing = subprocess.run([str(cuobjdump()), "-sass", cubin], check=True, capture_output=True, text=True).stdout
    found: dict[str, Kernel] = {}
    for name, text in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", listing, re.DOTALL):
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ )?(\S.*?) *;", text)
    return found


def first(kernel: Kernel, pattern: str, start: int = 0) -> int:
    return next(i for i, line in enumerate(kernel) if i >= start and re.match(pattern, line))


@pytest.mark.usefixtures("_this_nvcc")
def test_all_codes_of_a_warp_are_under_way_before_it_waits_for_an_absmax(arch: int) -> None:
    found = kernels("dequantize_nf4.cu", arch)
    assert len(found) == 3
    for name, kernel in found.items():
        loaded = first(kernel, r"LDG\.E\.U8 ")  # the absmax code
        register = kernel[loaded].split()[1].rstrip(",")
        wait = first(kernel, rf"[^,]*,.*\b{register}\b", loaded + 1)
        assert len([line for line in kernel[:wait] if line.startswith("LDG.E.NA")]) == 8, name


@pytest.mark.usefixtures("_this_nvcc")
def test_the_first_loads_are_under_way_before_the_tables_are_filled(arch: int) -> None:
    found = {name: kernel for name, kernel in kernels("linear_nf4.cu", arch).items() if "few_rows" in name}
    assert len(found) == 8
    for name, kernel in found.items():
        fill, filled = first(kernel, "STS"), first(kernel, "BAR")
        assert not [line for line in kernel[fill:filled] if line.startswith("LDG")], name
        assert [line for line in kernel[:fill] if line.startswith("LDG.E.NA.64")], name


@pytest.mark.parametrize("source", ["dequantize_nf4.cu", "dequantize_int8.cu", "linear_nf4.cu", "linear_int8.cu"])
def test_nothing_is_spilled(source: str, arch: int) -> None:
    for name, kernel in kernels(source, arch).items():
        assert not [line for line in kernel if line.startswith(("LDL", "STL"))], name
