"""The frozen weights of a model as they were quantized once, so that the next start reads them instead of the source.

    $NIBBLE_CACHE/weights/KEY/weights.safetensors   every frozen tensor as it is stored, a packed one in parts
                              manifest.json         what they were made from, a crc32 of each tensor and of the header

KEY is a hash of everything that the stored bits depend on: the source files (name, size, time, hash of their ends),
the shapes of both models, the bits of layers, head and tower, the compute dtype, how a delta was added, and FORMAT.
Only which of torch's summation orders the quantizer met (see kernels/nf4.py) is not in it: the cache keeps the bits of
who wrote it. What is changed in the middle of a file, with its time put back, is not noticed either (rsync would not):
delete KEY then.

A folder is whole or absent: written beside its place while the model loads, one tensor at a time, fsynced, renamed. One
process writes at a time, under a lock; the others go on without. Every tensor's crc32 is compared when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import Config
from engine.demo.cache import quantized_weights
from engine.files import discard, is_dir
from models.quantized import Packed, from_parts
from models.weights.archive import DTYPES as WEIGHT_DTYPES
from models.weights.archive import Archive, open_archive
from models.weights.identity import identity
from models.weights.source import LanguageSource, VisionSource

logger = logging.getLogger("nibble")

FORMAT = 2  # of this file and of what the quantizers make: another number makes every older cache a stranger
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}  # by the manifest's names


class CacheDamaged(Exception):
    """A cache is not what was written. The model that was being filled from it is of no use."""


class CacheUnreadable(Exception):
    """A cache is there, perhaps whole, and this process cannot read it: somebody else's, or a disk that fails."""


@dataclass(frozen=True, slots=True)
class WeightCache:
    """Where the weights of one key are, or would be."""

    folder: Path
    key: dict[str, Any]

    def open(self) -> CachedWeights | None:
        """What is there; None where nothing is.

        Raises:
            CacheDamaged: a file is missing, of another size, or not what was written.
            CacheUnreadable: the system refuses to read one.
        """
        if not is_dir(self.folder):
            return None
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            if manifest.pop("crc32") != manifest_crc(manifest) or manifest["key"] != self.key:
                raise CacheDamaged(f"{MANIFEST} is not what was written")
            size, header = (self.folder / WEIGHTS).stat().st_size, _header_crc(self.folder / WEIGHTS)
            if (manifest["bytes"], manifest["header"]) != (size, header):
                raise CacheDamaged(f"{WEIGHTS} has {size:,} bytes of {manifest['bytes']:,}, or another header")
            cached = CachedWeights(open_archive(self.folder / WEIGHTS), manifest["weights"])
            cached.sizes()  # every tensor that the manifest names is there
            return cached
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise CacheDamaged(f"{type(error).__name__}: {error}") from error
        except OSError as error:
            raise CacheUnreadable(f"{error.filename or WEIGHTS}: {error.strerror}") from error

    def drop(self, reason: str) -> None:
        """Takes a damaged cache away and says so."""
        logger.warning(
            "the cache of quantized weights in %s is damaged (%s): the weights are read and quantized again",
            self.folder, reason,
        )  # fmt: skip
        if is_dir(self.folder):
            discard(self.folder)


def cache_of(config: Config, language: LanguageSource, vision: VisionSource, dtype: torch.dtype) -> WeightCache | None:
    """The cache for this configuration on these sources. None where none is kept: not wanted, 16-bit layers (they are
    read as fast from their own files), the demo."""
    if not config.model.cache_weights or not config.model.language or config.bits == "16bit":
        return None
    key: dict[str, Any] = {
        "format": FORMAT, "language": _made_from(language), "vision": _made_from(vision), "bits": config.bits,
        "bits_head": config.bits_head, "bits_vision": config.bits_vision, "dtype": str(dtype),
        "delta": bool(config.model.delta),
        "legacy_permutation": bool(config.model.delta) and config.legacy.vicuna_permutation,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return WeightCache(quantized_weights() / digest[:16], key)


def _made_from(source: LanguageSource | VisionSource) -> list[Any]:
    """Shape (which blocks are read, in which order are q and k?) and files of one model."""
    files = list(source.files)
    return [repr(source.config)] + [
        [path.name, file["size"], path.stat().st_mtime_ns, file["sha256"]]
        for path, file in zip(files, identity(files)["files"], strict=True)
    ]


@dataclass(frozen=True, slots=True)
class CachedWeights:
    """A cache that is whole as far as sizes and the header tell."""

    archive: Archive
    weights: dict[str, dict[str, Any]]  # by name: crc32 of each part ("" where it is one tensor), shape, dtype

    def sizes(self) -> dict[str, int]:
        """Bytes of each weight by its name in the model (language.head.weight)."""
        sizes = self.archive.sizes
        return {name: sum(sizes[joined(name, part)] for part in e["crc32"]) for name, e in self.weights.items()}

    def stream(self, part: str) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every (name within the part of the model, weight as it is stored): views of the mapped file.

        Raises:
            CacheDamaged: a tensor is not what was written.
        """
        for name, entry in self.weights.items():
            if name.startswith(f"{part}."):
                yield name.removeprefix(f"{part}."), self._read(name, entry)
                for each in entry["crc32"]:
                    self.archive.release(joined(name, each))

    def _read(self, name: str, entry: dict[str, Any]) -> Tensor | Packed:
        try:
            tensors = {part: self.archive.read(joined(name, part)) for part in entry["crc32"]}
            for part, tensor in tensors.items():
                if _crc(tensor) != entry["crc32"][part]:
                    raise CacheDamaged(f"{joined(name, part)} is not what was written")
            if "" in tensors:
                return tensors[""]
            rows, columns = entry["shape"]
            return from_parts(tensors, (rows, columns), DTYPES[entry["dtype"]])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise CacheDamaged(f"{name}: {error}") from error


def joined(name: str, part: str) -> str:
    """The name of a part of a weight in the file."""
    return f"{name}.{part}" if part else name


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def manifest_crc(manifest: Mapping[str, Any]) -> int:
    """Of everything that the manifest holds besides its own crc32."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _header_crc(path: Path) -> int:
    with path.open("rb") as file:
        length = file.read(8)
        return zlib.crc32(length + file.read(min(int.from_bytes(length, "little"), 1 << 26)))
