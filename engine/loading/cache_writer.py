"""Writes the cache of quantized weights (engine/loading/cache.py) while a model is filled, one tensor at a time.

It is written beside its place, fsynced and renamed, by one process at a time, under a lock. What goes wrong costs the
cache and not the run: it is said, and the model loads on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from engine.files import sweep
from engine.loading.cache import MANIFEST, WEIGHTS, WeightCache, joined, manifest_crc
from engine.manifest import write_new
from engine.tensor_file import TensorWriter, file_size
from models.placement import Bits, specs, stored
from models.quantized import Spec, parts
from models.weights.whole import TEMPORARY, beside, sync

logger = logging.getLogger("nibble")

RESERVE = 1 << 30  # bytes of the disk that are left for others

Parts = Mapping[str, nn.Module]  # the model's parts with frozen weights: language, vision


def start_writing(cache: WeightCache, model: Parts, bits: Mapping[str, Bits], dtype: torch.dtype) -> CacheWriter | None:
    """Begins to write what `model`, still unfilled, will hold. None, with the reason in the log, where it cannot: the
    disk is full or not writable, or another process writes a cache just now."""
    planned = {
        f"{part}.{name}": spec
        for part, module in model.items()
        for name, spec in specs(module, bits=bits[part], dtype=dtype).items()
    }
    folder = cache.folder.parent
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        if lock is None or cache.folder.is_dir():  # somebody else writes, or has written just now
            logger.info(
                "quantized weights are not kept: another process is writing, or has just written, in %s", folder
            )
        else:
            sweep(folder)  # what a killed writer left
            if _has_room(folder, file_size(planned)):
                return CacheWriter(cache, planned, model, lock)
    except OSError as error:
        logger.warning("quantized weights are not kept: %s: %s", folder, error.strerror)
    if lock is not None:
        lock.close()
    return None


class CacheWriter:
    """A cache that is being written. add() every tensor, then commit(); abort() at last, whatever happened."""

    def __init__(self, cache: WeightCache, planned: Mapping[str, Spec], model: Parts, lock: IO[str]) -> None:
        self.cache = cache
        self.model = model
        self._lock = lock
        self._weights: dict[str, dict[str, Any]] = {}
        self._temporary = beside(cache.folder, TEMPORARY)
        self._temporary.mkdir()
        try:
            self._file: TensorWriter | None = TensorWriter(self._temporary / WEIGHTS, planned)
        except OSError:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise

    def add(self, part: str, name: str) -> None:
        """Writes the tensor that has just been placed."""
        if self._file is None:
            return
        weight = stored(self.model[part], name)
        tensors = {"": weight} if isinstance(weight, Tensor) else parts(weight)
        full = f"{part}.{name}"
        try:
            crcs = {each: self._file.write(joined(full, each), tensor) for each, tensor in tensors.items()}
        except OSError as error:
            self._give_up(error)
            return
        dtype = str(weight.dtype).removeprefix("torch.")
        self._weights[full] = {"crc32": crcs, "shape": list(weight.shape), "dtype": dtype}

    def commit(self) -> Path | None:
        """Gives the cache its name. Returns its folder; None where it could not be written."""
        if self._file is None:
            return None
        folder = self.cache.folder
        try:
            size = self._file.finish()
            manifest: dict[str, Any] = {
                "key": self.cache.key, "bytes": size, "header": zlib.crc32(self._file.head), "weights": self._weights,
            }  # fmt: skip
            manifest["crc32"] = manifest_crc(manifest)
            write_new(self._temporary / MANIFEST, json.dumps(manifest).encode())
            sync(self._temporary)
            self._temporary.rename(folder)
            sync(folder.parent)
        except OSError as error:
            self._give_up(error)
            return None
        self._file = None
        self._lock.close()
        return folder

    def abort(self) -> None:
        """Leaves nothing behind, unless committed."""
        if self._file is not None:
            self._file.close()
            self._file = None
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._lock.close()

    def _give_up(self, error: OSError) -> None:
        logger.warning("quantized weights are not kept: %s: %s", self._temporary, error.strerror or error)
        self.abort()


def _lock(folder: Path) -> IO[str] | None:
    """The lock of who writes in `folder`, held until it is closed; None while another process has it."""
    file = (folder / ".lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file


def _has_room(folder: Path, needed: int) -> bool:
    free = shutil.disk_usage(folder).free
    missing = needed + RESERVE - free
    if missing > 0:
        logger.warning(
            "quantized weights are not kept in %s: they take %.2f GB, %.2f GB are free and %.2f GB of that stay free "
            "for others, so %.2f GB are missing; NIBBLE_CACHE names another place, --model.no_cache_weights none",
            folder, needed / 1e9, free / 1e9, RESERVE / 1e9, missing / 1e9,
        )  # fmt: skip
    return missing <= 0
