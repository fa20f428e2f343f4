"""Compiles every kernel without a GPU and prints what it takes of a card: registers, spills, shared memory.

    python -m kernels.compile --arch 80,86,90        the kernels as bf16 models launch them
    python -m kernels.compile --all                  fp16 and fp32 too, and every width of the launch table

Triton's launchers themselves run, on tensors without data, as if on each card: what is compiled has their configuration
and the specialisation (alignment, divisibility) that their arguments get. csrc's kernels are read from the library that
`make` builds, where nvcc is. Exit code 1 where a kernel does not compile, asks for more shared memory than the card has
for a block, or spills although it is bound by memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton

from csrc import build
from kernels import samples
from kernels.dispatch import Kernel, as_on_card, recording
from kernels.launches import COMPUTE_BOUND, Launch

ARCHS = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB that a block may have
CSRC = "csrc"
TOKENS = 2048
WIDTHS = (1024, 4096)  # of the vision tower and the 7B language model
ALL_WIDTHS = (64, 576, 1024, 1152, 2048, 2560, 3072, 4096, 5120, 6656, 8192, 11008, 16384)
DTYPES = (torch.bfloat16,)
ALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes. Bytes; registers and spills are of one thread."""

    kernel: str
    call: str  # what it was compiled for
    dtype: str
    width: int  # 0: any, as csrc's
    arch: int
    warps: int  # 0: of csrc's kernels not known
    registers: int
    spills: int
    shared: int
    problem: str = ""


def compile_op(op: str, arch: int, dtype: torch.dtype, widths: tuple[int, ...]) -> list[Resources]:
    """Everything that the samples of `op` launch on a card of capability `arch`, each distinct kernel once."""
    found: dict[str, Resources] = {}
    draw = samples.Draw(torch.device("meta"), dtype)

    for width in widths:
        for call in samples.calls(op, draw, TOKENS, width):

            def compile_(
                kernel: Kernel, grid: tuple[int, ...], config: Launch, args: Any, constants: Any,
                width: int = width, label: str = call.label,
            ) -> None:  # fmt: skip
                key, source = _source(kernel, args, constants, arch)
                key += f" {config.warps} {config.stages}"
                if key not in found:
                    context = (kernel.__name__, label, str(dtype).removeprefix("torch."), width, arch, config.warps)
                    found[key] = _resources(source, config, *context)

            with as_on_card(arch), recording(compile_):
                try:
                    call.registered.launcher(*call.arguments)
                except ValueError as error:  # a width that the op does not take
                    if "takes at most" not in str(error):
                        raise
    return list(found.values())


def _source(kernel: Any, args: tuple[object, ...], constants: dict[str, object], arch: int) -> tuple[str, Any]:
    """The kernel specialised as triton's launcher would for these arguments, and a text that tells it from others."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.compiler import ASTSource, make_backend

    backend = make_backend(GPUTarget("cuda", arch, 32))
    given = dict(zip([p.name for p in kernel.params if p.name not in constants], args, strict=True)) | constants
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], object] = {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", None
        else:
            kind, key = native_specialize_impl(
                BaseBackend, value, parameter.is_const, not parameter.do_not_specialize,
                not parameter.do_not_specialize_on_alignment,
            )  # fmt: skip
        signature[parameter.name] = kind
        if kind == "constexpr":
            constexprs[(i,)] = value
        elif isinstance(key, str) and key:
            attributes[(i,)] = backend.parse_attr(key)
    text = f"{kernel.__name__} {signature} {constexprs} {attributes}"
    return text, ASTSource(kernel, signature, constexprs, attributes)


def _resources(
    source: Any, config: Launch, kernel: str, label: str, dtype: str, width: int, arch: int, warps: int
) -> Resources:
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": config.warps, "num_stages": config.stages}
    name = kernel.removesuffix("_kernel")
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # of many kinds, and each a finding about this kernel
        text = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return Resources(name, label, dtype, width, arch, warps, 0, 0, 0, text)
    registers, spills = _usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    problem = problem_of(name, arch, spills, shared, compiled.asm["llir"])
    return Resources(name, label, dtype, width, arch, warps, registers, spills, shared, problem)


def problem_of(kernel: str, arch: int, spills: int, shared: int, llir: str = "") -> str:
    """What is wrong with a compiled kernel; empty where nothing is. Bytes; `llir` is its LLVM code, of Triton's."""
    if shared > 1024 * SHARED_LIMIT[arch]:
        return f"shared memory over the {SHARED_LIMIT[arch]} KiB of the card"
    if spills and kernel not in COMPUTE_BOUND:
        return "spills, though bound by memory"
    if re.search(r"__nv_(?!exp2f\b)", llir):  # that of tl.exp2 comes to one instruction, fewer than tl.exp
        return "calls libdevice"
    return "computes in fp64" if "double" in llir else ""


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from the compiled code."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        ((_, _, counts),) = _usages(path)
    return counts["REG"], counts["STACK"] + counts["LOCAL"]


def _usages(compiled: Path) -> Iterator[tuple[int, str, dict[str, int]]]:
    """(card, mangled name, counts) of each kernel in a cubin (card 0) or in a library for several cards."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", compiled], capture_output=True, text=True, check=True).stdout
    arch = 0
    for found in re.finditer(r"^arch = sm_(\d+)|^ *Function (\S+):\s+(.*)$", text, re.MULTILINE):
        if found[1]:
            arch = int(found[1])
        else:
            yield arch, found[2], {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", found[3])}


def csrc_kernels(library: Path, archs: tuple[int, ...]) -> Iterator[Resources]:
    """Every kernel of a library of csrc, on those of `archs` that it has machine code for."""
    for arch, mangled, counts in _usages(library):
        if arch in archs:
            name, about, dtype = plain_name(_demangled(mangled))
            spills, shared = counts["STACK"] + counts["LOCAL"], counts["SHARED"]
            problem = problem_of(name, arch, spills, shared)
            yield Resources(name, f"csrc{about}", dtype, 0, arch, 0, counts["REG"], spills, shared, problem)


def _demangled(name: str) -> str:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p  # which leaks the text: a few bytes a kernel
    text: bytes | None = library.__cxa_demangle(name.encode(), None, None, None)
    return text.decode() if text else name


def plain_name(signature: str) -> tuple[str, str, str]:
    """("linear_nf4", ", 8, true", "float16") of "void nibble::linear_nf4<nibble::fp16, 8, true>(...)"."""
    text = signature.replace("(anonymous namespace)::", "").replace("nibble::", "").removeprefix("void ")
    name, bracket, rest = text.partition("(")[0].partition("<")
    values = rest.removesuffix(">").split(", ") if bracket else []
    dtypes = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    about = "".join(f", {value}" for value in values if value not in dtypes)
    return name, about, next((dtypes[value] for value in values if value in dtypes), "any")


def compile_all(
    archs: tuple[int, ...], dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...], ops: list[str], jobs: int
) -> Iterator[Resources]:
    """Every kernel of `ops`, in processes of their own."""
    work = [(op, arch, dtype, widths) for op in ops for arch in archs for dtype in dtypes]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(compile_op, *zip(*work, strict=True)):
            yield from rows


def as_text(row: Resources) -> str:
    size = f"{row.dtype} {row.width or ''}"
    warps = f"{row.warps:>2} warps" if row.warps else ""
    figures = f"{row.registers:>4} registers {row.spills:>5} B spilled {row.shared / 1024:>6.1f} KiB shared"
    return f"sm_{row.arch}  {row.kernel:<28} {row.call:<44} {size:<15} {warps:<8} {figures}  {row.problem}"


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="80,86,90", help=f"compute capabilities, of {', '.join(map(str, ARCHS))}")
    parser.add_argument("--all", action="store_true", help="every dtype and every width of the launch table")
    parser.add_argument("--only", metavar="OP", help="the kernels of kernels/OP.py, or csrc")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    flags = parser.parse_args(argv)
    known = {str(arch): arch for arch in ARCHS}
    if not all(arch in known for arch in flags.arch.split(",")):
        parser.error(f"--arch takes numbers of {', '.join(known)}, separated by commas; got {flags.arch!r}")
    flags.arch = tuple(known[arch] for arch in flags.arch.split(","))
    parts = [*samples.ops(), CSRC]
    if flags.only is not None and flags.only not in parts:
        parser.error(f"--only takes one of {', '.join(parts)}; got {flags.only!r}")
    return flags


def _rows(flags: argparse.Namespace) -> Iterator[Resources]:
    if flags.only in (None, CSRC):
        try:
            yield from csrc_kernels(build.build(jobs=flags.jobs), flags.arch)
        except build.NoCompilerError:
            print("csrc was not compiled: nvcc is not here")
        except build.BuildError as error:
            print(error)
            yield Resources(CSRC, "all of it", "any", 0, 0, 0, 0, 0, 0, "does not compile")
    if flags.only != CSRC:
        widths, dtypes = (ALL_WIDTHS, ALL_DTYPES) if flags.all else (WIDTHS, DTYPES)
        ops = samples.ops() if flags.only is None else [flags.only]
        yield from compile_all(flags.arch, dtypes, widths, ops, flags.jobs)


def main(argv: list[str]) -> int:
    """Compile, print. Returns 0, or 1 where a kernel has a problem."""
    if os.environ.get("TRITON_INTERPRET") == "1":  # triton reads it when it is imported, which it was
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "kernels.compile", *argv], env=environment, check=False).returncode
    flags = options(argv)
    rows = []
    for row in _rows(flags):
        rows.append(row)
        print(as_text(row), flush=True)
    if flags.json is not None:
        flags.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    problems = [row for row in rows if row.problem]
    print(f"{len(rows)} kernels compiled, {len(problems)} with a problem")
    for row in problems:
        print(as_text(row))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
