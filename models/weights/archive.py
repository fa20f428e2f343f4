"""Opens one file of tensors (.safetensors, .pth, .pt, .bin) by name, lazily and without running its code.

safetensors and torch's zip files are memory-mapped: a tensor costs no anonymous memory until it is copied. torch's
files from before 1.6 (no zip) cannot be mapped and are held whole. A pickle is only ever read with weights_only=True.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.weights.errors import WeightsError
from models.weights.host_memory import drop_pages

Shape = tuple[int, ...]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_SAFE_TORCH = (2, 10)  # before it, weights_only could be bypassed (CVE-2025-32434, CVE-2026-24747)
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # safetensors' dtypes; others: 1
ZIP_MAGIC = b"PK\x03\x04"
NOT_WEIGHTS = {  # how files begin (in lower case) that stand where the weights should be
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "git lfs pull"),
    b"<!doctype html": ("a web page, not the weights", "download it in a browser: the site asked something first"),
    b"<html": ("a web page, not the weights", "download it in a browser: the site asked something first"),
}
DAMAGED = "the file is damaged or was not copied to its end"
GET_AGAIN = "download or copy the file again, and compare its size with the original's"

# What torch's reader and restricted unpickler raise on bytes that are not what they seem.
_READ_ERRORS = (
    RuntimeError, UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError,
    AssertionError, ArithmeticError, MemoryError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Archive:
    """The tensors of one file. `shapes` and `sizes` have every name and are known before any tensor is read."""

    path: Path
    shapes: Mapping[str, Shape]
    sizes: Mapping[str, int]  # bytes
    read: Callable[[str], Tensor]
    is_mapped: bool  # what `read` returns are views of the mapped file; else everything is in memory as long as this is

    def fetch(self, name: str) -> Tensor:
        """One tensor in the file's dtype, fp16, bf16 or fp32 (a WeightsError otherwise)."""
        tensor = self.read(name).detach()
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            got = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise WeightsError(self.path, f"{name} is {got}; weights are dense and float16, bfloat16 or float32")
        return tensor

    def release(self, name: str) -> None:
        """Says that this tensor is not wanted for now: a mapped file's pages leave the process. They come back when
        somebody reads them."""
        if self.is_mapped:
            drop_pages(self.read(name))


class Reopened:
    """A file that is opened when its tensors are asked for and forgotten by close(). In between, one that cannot be
    mapped is held whole."""

    def __init__(self, open_file: Callable[[], Archive]) -> None:
        self._open_file = open_file
        self._archive: Archive | None = None

    def __call__(self) -> Archive:
        if self._archive is None:
            self._archive = self._open_file()
        return self._archive

    def close(self) -> None:
        self._archive = None


def open_archive(path: Path) -> Archive:
    """The tensors of `path`.

    Raises:
        WeightsError: the file is missing, damaged, holds something else than a mapping of names to tensors, or is a
            pickle that wants to import more than tensors need.
    """
    if path.suffix != ".safetensors":
        mapped = check_file(path).startswith(ZIP_MAGIC)
        return archive_of(path, read_pickle(path), is_mapped=mapped)
    check_file(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        sizes = {name: math.prod(shapes[name]) * _BYTES.get(part.get_dtype(), 1) for name, part in slices.items()}
        is_mapped = _reads_views(file.get_tensor, sizes)
    except (SafetensorError, OSError, RuntimeError) as error:  # the last: torch, which maps for safetensors
        raise WeightsError(path, f"{DAMAGED}: {error}", do=GET_AGAIN) from error
    return Archive(path, shapes, sizes, file.get_tensor, is_mapped)


def archive_of(path: Path, values: object, *, is_mapped: bool = False) -> Archive:
    """`values`, which was read from `path` and must be a dict of names to tensors."""
    if not isinstance(values, dict):
        raise WeightsError(path, f"holds a {type(values).__name__}; expected a dict of names to tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(path, f"entry {name!r} is a {type(value).__name__}; expected names with tensors")
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    sizes = {name: value.numel() * value.element_size() for name, value in values.items()}
    return Archive(path, shapes, sizes, values.__getitem__, is_mapped)


def read_pickle(path: Path, allowed: tuple[type, ...] = ()) -> object:
    """What torch.save wrote to `path`: tensors, containers, numbers, strings, and classes of `allowed`."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < FIRST_SAFE_TORCH:
        raise WeightsError(path, f"torch {torch.__version__} does not open pickles safely", do="install torch >= 2.11")
    start = check_file(path)
    if is_torchscript(path):
        raise WeightsError(path, "is a TorchScript program, not a file of tensors", do="save its state_dict() instead")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP_MAGIC))
    except _READ_ERRORS as error:
        raise _explain(path, error) from None  # torch's own text advises weights_only=False


def check_file(path: Path) -> bytes:
    """The first bytes of `path`, after making sure that it can be the file that it is called."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror}") from error
    if not start:
        raise WeightsError(path, "the file is empty", do=GET_AGAIN)
    for magic, (what, do) in NOT_WEIGHTS.items():
        if start.lower().startswith(magic):
            raise WeightsError(path, f"is {what}", do=do)
    return start


def is_torchscript(path: Path) -> bool:
    """Whether `path` is an archive of torch.jit.save: a zip with code in it."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(path, f"{DAMAGED}: {error}", do=GET_AGAIN) from error


def _reads_views(read: Callable[[str], Tensor], sizes: Mapping[str, int]) -> bool:
    """Whether two reads of a tensor give the same memory: the file's, not copies of it."""
    smallest = min((name for name in sizes if sizes[name]), key=sizes.__getitem__, default=None)
    if smallest is None:
        return False
    first, second = read(smallest), read(smallest)
    return first.data_ptr() == second.data_ptr()


def _explain(path: Path, error: BaseException) -> WeightsError:
    imported = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, UnpicklingError) and imported:
        return WeightsError(
            path, f"refused: the file wants to import {imported[1].rstrip('.,')}, and weights need no code",
            do="use the safetensors version of these weights, or have their author save tensors only",
        )  # fmt: skip
    lines = str(error).strip().splitlines()
    reason = "" if isinstance(error, UnpicklingError) or not lines else f": {lines[0]}"
    return WeightsError(path, DAMAGED + reason, do=GET_AGAIN)
