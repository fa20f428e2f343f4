"""Image files to tiles, as LaVIN prepares them: RGB, squashed to a square by PIL's bicubic filter on bytes, divided by
255, ImageNet mean and deviation (not CLIP's). EXIF orientation is not applied, as there.

Files are data of strangers: three formats, a size and a pixel limit read from the header before anything is decoded,
and no path that leaves the folder it was given for.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 25_000_000
MAX_BYTES = 50_000_000
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# What Pillow's three decoders raise on damaged files.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def resolve(folder: str, name: str, where: str) -> str:
    """The absolute path of `name` under `folder`.

    Raises:
        DataError: the file is missing, or its real path (links followed) is outside of the folder.
    """
    if "\0" in name:
        raise DataError(f"an image's name holds a NUL: {name!r}", where=where)
    root = os.path.realpath(folder)
    path = os.path.realpath(Path(root) / name)
    if os.path.commonpath((root, path)) != root:
        raise DataError(
            f"an image is outside of its folder: {name!r}", where=where, why=f"it leads to {path}, the folder is {root}"
        )
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        raise DataError(f"an image is missing: {path}", where=where, do="check the folder of the images")
    return path


def load_image(path: str, size: int, where: str = "") -> Tensor:
    """The file as uint8 [3, size, size].

    Raises:
        DataError: the file is missing, too large, not JPEG, PNG or WEBP, or damaged. It names the path and `where`.
    """
    at = f"{where}: {path}" if where else path
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError("an image is not a regular file", where=at)
        if status.st_size > MAX_BYTES:
            raise DataError(f"an image file has {status.st_size} bytes, the limit is {MAX_BYTES}", where=at)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                found = f"{image.width} x {image.height} pixels"
                raise DataError(f"an image has {found}, the limit is {MAX_PIXELS}", where=at)
            squashed = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except _DAMAGED as error:
        raise DataError(
            "an image cannot be read",
            where=at,
            why=f"{type(error).__name__}: {error}",
            do="replace the file; JPEG, PNG and WEBP are read",
        ) from error
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()


def normalize(image: Tensor) -> Tensor:
    """uint8 [3, H, W] -> fp32 [3, H, W]: (x / 255 - mean) / std."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (image.float() / 255 - mean) / std


class TileReader:
    """Tiles of `size` pixels by path. The first images read stay in memory, as bytes, up to `cache_bytes`: a data set
    is read in another order each epoch, so an image that was dropped would be the next one asked for as likely as any.
    """

    def __init__(self, size: int = 224, cache_bytes: int = 256 << 20) -> None:
        self.size = size
        self._room = cache_bytes
        self._cache: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def tile(self, path: str, where: str = "") -> Tensor:
        """fp32 [3, size, size]. Raises DataError as `load_image` does."""
        image = self._cache.get(path)
        if image is None:
            image = load_image(path, self.size, where)
            with self._lock:
                if path not in self._cache and image.nbytes <= self._room:
                    self._cache[path] = image
                    self._room -= image.nbytes
        return normalize(image)
