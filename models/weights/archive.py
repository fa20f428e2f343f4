"""Opens one file of tensors (.safetensors, .pth, .pt, .bin) by name, lazily and without running its code.

safetensors and torch's zip files are memory-mapped: a tensor costs no anonymous memory until it is copied. torch's
files from before 1.6 (no zip) cannot be mapped and are held whole. A pickle is only ever read with weights_only=True.
"""

from __future__ import annotations

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

Shape = tuple[int, ...]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_SAFE_TORCH = (2, 10)  # before it, weights_only could be bypassed (CVE-2025-32434, CVE-2026-24747)
ZIP_MAGIC = b"PK\x03\x04"
NOT_WEIGHTS = {  # how files begin (in lower case) that stand where the weights should be
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "git lfs pull"),
    b"<!doctype html": ("a web page, not the weights", "download it in a browser: the site asked something first"),
    b"<html": ("a web page, not the weights", "download it in a browser: the site asked something first"),
}
DAMAGED = "the file is damaged or was not copied to its end"
GET_AGAIN = "get the file again and compare its size with the original's"

# What torch's reader and restricted unpickler raise on bytes that are not what they seem.
_READ_ERRORS = (
    RuntimeError, UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError,
    AssertionError, ArithmeticError, MemoryError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Archive:
    """The tensors of one file. `shapes` has every name and is known before any tensor is read."""

    path: Path
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]

    def fetch(self, name: str) -> Tensor:
        """One tensor in the file's dtype, fp16, bf16 or fp32 (a WeightsError otherwise)."""
        tensor = self.read(name).detach()
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            got = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise WeightsError(self.path, f"{name} is {got}; weights are dense and float16, bfloat16 or float32")
        return tensor


def open_archive(path: Path) -> Archive:
    """The tensors of `path`.

    Raises:
        WeightsError: the file is missing, damaged, holds something else than a mapping of names to tensors, or is a
            pickle that wants to import more than tensors need.
    """
    if path.suffix != ".safetensors":
        return archive_of(path, read_pickle(path))
    check_file(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(path, f"{DAMAGED}: {error}", do=GET_AGAIN) from error
    return Archive(path, shapes, file.get_tensor)


def archive_of(path: Path, values: object) -> Archive:
    """`values`, which was read from `path` and must be a dict of names to tensors."""
    if not isinstance(values, dict):
        raise WeightsError(path, f"holds a {type(values).__name__}; expected a dict of names to tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(path, f"entry {name!r} is a {type(value).__name__}; expected names with tensors")
    return Archive(path, {name: tuple(value.shape) for name, value in values.items()}, values.__getitem__)


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
