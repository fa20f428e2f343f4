"""csrc's functions, called on tensors: found, loaded with ctypes, launched on a tensor's device and current stream.

The library is build/csrc/libnibble.so of this checkout, else that of the installed wheel (package nibble_csrc). It must
have been built from the sources that lie here: another one might take other arguments.

With NIBBLE_EMULATE=1 CPU tensors are taken too, by the same kernels in csrc's emulator (slowly: it is how they are
tested without a GPU); g++ builds that library on first use.

The library has a CUDA runtime of its own inside, torch has another. Both act in a device's one primary context: the one
that is current to the thread once torch has chosen a device, or device 0's in a thread where nobody has chosen yet. So
tensors, streams and graph captures of torch are valid here. The driver must know CUDA's major version of both.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csrc import build
from kernels import dispatch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_PARTS = 4


class NF4(ctypes.Structure):
    """struct nibble_nf4: a part [rows, columns] of a weight; csrc/nibble.h says what the fields hold."""

    _fields_ = (
        ("codes", c_void_p), ("absmax_codes", c_void_p), ("absmax2", c_void_p), ("offset", c_void_p),
        ("rows", c_int64), ("first_block", c_int64),
    )  # fmt: skip


class Int8(ctypes.Structure):
    """struct nibble_int8."""

    _fields_ = (("codes", c_void_p), ("scale", c_void_p), ("rows", c_int64))


class Output(ctypes.Structure):
    """struct nibble_output: where the product with one part goes; `bias` may be None, `stride` is in elements."""

    _fields_ = (("bias", c_void_p), ("y", c_void_p), ("stride", c_int64))


def _dequantize(part: type[ctypes.Structure]) -> list[Any]:
    return [POINTER(part), c_int, c_int64, c_void_p, c_int, c_void_p]


def _linear(part: type[ctypes.Structure]) -> list[Any]:
    outputs_and_x = [POINTER(part), POINTER(Output), c_int, c_int64, c_void_p, c_int64]
    return [*outputs_and_x, c_int64, c_int, c_int, c_void_p, c_int64, c_void_p]


FUNCTIONS = {
    "nibble_dequantize_nf4": _dequantize(NF4),
    "nibble_dequantize_int8": _dequantize(Int8),
    "nibble_linear_nf4": _linear(NF4),
    "nibble_linear_int8": _linear(Int8),
}

Function = Callable[..., int]
Recorder = Callable[[str, Sequence[Tensor]], None]  # called with what `call` would launch, and all its tensors

_recorders: list[Recorder] = []


class _Library:
    """A loaded library. Raises OSError where it cannot be loaded or is not what its bytes say."""

    def __init__(self, path: Path) -> None:
        self.loaded = ctypes.CDLL(str(path))
        self.loaded.nibble_sources.restype = self.loaded.nibble_error.restype = c_char_p
        if self.loaded.nibble_sources().decode() != build.sources_hash():
            raise OSError(f"{path} was replaced after this process had loaded it")  # the loader knows files by name
        self.functions: dict[str, Function] = {}
        for name, types in FUNCTIONS.items():
            function = getattr(self.loaded, name)
            function.argtypes = types
            self.functions[name] = function

    def error(self, status: int) -> str:
        return str(self.loaded.nibble_error(status).decode())


def missing() -> str:
    """Why csrc's kernels cannot take CUDA tensors here, and what to do; empty where they can."""
    return _cuda()[1]


def available_for(x: Tensor) -> str:
    """Why csrc's kernels cannot take `x`, and what to do; empty where they can."""
    if dispatch.on_another_card():
        return ""
    if x.is_cuda:
        return missing() or _uncovered(x.device.index)
    if x.device.type != "cpu":
        return f"csrc takes no {x.device.type} tensors"
    return _emulated()[1] if os.environ.get("NIBBLE_EMULATE") == "1" else "a CPU tensor needs NIBBLE_EMULATE=1"


def call(function: str, tensors: Sequence[Tensor], *arguments: object) -> None:
    """Launches `function` of csrc/nibble.h on the device and the current stream of the first tensor.

    `tensors`: all whose pointers are among `arguments`; the stream, which is the last, is added here. Nothing runs on
    meta tensors and under dispatch.as_on_card. Raises RuntimeError with the text of a status that is not 0, and where
    the library cannot take the first tensor.
    """
    first = tensors[0]
    for recorder in _recorders:
        recorder(function, tensors)
    if first.is_meta or dispatch.on_another_card():
        return
    if not first.is_cuda:
        _emulate(function, tensors, arguments)
        return
    library = _cuda()[0]
    if library is None:
        raise RuntimeError(f"{function}: {missing()}")
    device = first.device.index
    if device == torch._C._cuda_getDevice():
        status = library.functions[function](*arguments, torch._C._cuda_getCurrentRawStream(device))
    else:
        with torch.cuda.device(device):
            status = library.functions[function](*arguments, torch._C._cuda_getCurrentRawStream(device))
    if status:
        raise RuntimeError(f"{function}: {library.error(status)} (status {status})")


def recording(recorder: Recorder) -> AbstractContextManager[None]:
    """Calls `recorder` before each launch."""
    return dispatch.listed(recorder, _recorders)


def found() -> tuple[Path, build.Built] | None:
    """The library that was built from the sources here: of this checkout, else of the installed wheel."""
    here = build.sources_hash()
    described = ((path, build.built(path)) for path in _places())
    return next(((path, about) for path, about in described if about and about.sources == here), None)


def _places() -> Iterator[Path]:
    yield build.LIBRARY
    spec = importlib.util.find_spec("nibble_csrc")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).with_name(build.LIBRARY.name)


@cache
def _cuda() -> tuple[_Library | None, str]:
    """The library for CUDA tensors, or why there is none."""
    usable = found()
    if usable is None:
        stale = next((path for path in _places() if path.exists()), None)
        if stale is None:
            return None, "csrc is not built: make, with nvcc, or install the wheel that pip wheel . makes where nvcc is"
        return None, f"{stale} was built from other sources: make, with nvcc"
    path, about = usable
    if old := _too_old_driver(about):
        return None, f"{path} {old}"
    try:
        return _Library(path), ""
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"


def _too_old_driver(about: build.Built) -> str:
    """A CUDA runtime needs a driver of its own major version or a newer one."""
    if not torch.cuda.is_available():
        return ""
    version = c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10
    if int(about.compiler.removeprefix("CUDA ").partition(".")[0]) <= major:
        return ""
    return f"needs {about.compiler}, the driver has {major}.{minor}: update it, or build with an older nvcc"


@cache
def _uncovered(device: int) -> str:
    usable = found()
    major, minor = torch.cuda.get_device_capability(device)
    if usable is None or usable[1].covers(10 * major + minor):
        return ""
    return (
        f"{usable[0]} was built for {usable[1]}, this GPU is sm_{major}{minor}: python -m csrc.build, with a newer nvcc"
    )


@dataclass(frozen=True, slots=True)
class Accesses:
    """Bytes that kernels in the emulator loaded from and stored to a tensor (and others of its memory range)."""

    tensor: Tensor
    loaded: int
    loaded_distinct: int
    stored: int
    stored_distinct: int


@contextmanager
def counting() -> Iterator[list[Accesses]]:
    """Counts what the calls on CPU tensors inside access; the list is filled at its end. Needs NIBBLE_EMULATE=1."""
    emulator, why = _emulated()
    if emulator is None:
        raise ValueError(why)
    counts: list[Accesses] = []
    emulator.keeps = True
    try:
        yield counts
        counts += emulator.counts()
    finally:
        emulator.keeps = False
        emulator.forget()


class _Emulator(_Library):
    """The library for the CPU. It checks that each access lies within a tensor of the call, and counts its bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lock = threading.Lock()  # its state is global, and ctypes lets other threads run
        self.keeps = False  # ranges and counts from one call to the next
        self.ranges: list[tuple[int, int, Tensor]] = []  # first byte, end; by their number in the emulator
        self.loaded.nibble_emulator_track.argtypes = [c_void_p, c_int64]
        self.loaded.nibble_emulator_counts.argtypes = [c_int, POINTER(c_int64)]

    def call(self, function: str, tensors: Sequence[Tensor], arguments: tuple[object, ...]) -> None:
        with self.lock:
            for start, end, tensor in _ranges(tensors):
                if (start, end) not in [known[:2] for known in self.ranges]:
                    self.loaded.nibble_emulator_track(start, end - start)
                    self.ranges.append((start, end, tensor))
            status = self.functions[function](*arguments, None)
            if status:
                text = self.error(status)
                self.forget()
                raise RuntimeError(f"{function}: {text} (status {status})")
            if not self.keeps:
                self.forget()  # the tensors may be freed now

    def forget(self) -> None:
        self.loaded.nibble_emulator_reset()
        self.ranges = []

    def counts(self) -> list[Accesses]:
        found = []
        for number, (_, _, tensor) in enumerate(self.ranges):
            values = (c_int64 * 4)()
            if self.loaded.nibble_emulator_counts(number, values):
                raise RuntimeError(f"the emulator has no range {number}")
            found.append(Accesses(tensor, *values))
        return found


def _ranges(tensors: Sequence[Tensor]) -> list[tuple[int, int, Tensor]]:
    """First and last address of each tensor; one range for those that overlap, as the columns of one matrix do."""
    spans: list[tuple[int, int, Tensor]] = []
    for x in sorted((x for x in tensors if x.numel()), key=lambda x: x.data_ptr()):
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        start, end = x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
        if spans and start < spans[-1][1]:
            start, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((start, end, x))
    return spans


@cache
def _emulated() -> tuple[_Emulator | None, str]:
    """The library for CPU tensors, or why there is none."""
    try:
        return _Emulator(build.build_emulated()), ""
    except (build.BuildError, OSError) as error:
        return None, f"csrc's emulator: {error}"


def _emulate(function: str, tensors: Sequence[Tensor], arguments: tuple[object, ...]) -> None:
    if why := available_for(tensors[0]):
        raise RuntimeError(f"{function}: {why}")
    emulator = _emulated()[0]
    assert emulator is not None
    emulator.call(function, tensors, arguments)
