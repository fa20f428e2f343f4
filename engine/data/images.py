"""Image files to the tiles of a tower (image_processor.py).

Files are data of strangers: three formats, a size and a pixel limit read from the header before anything is decoded,
and no path that leaves the folder it was given for.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from torch import Tensor

from engine.data.image_processor import ImageProcessor
from engine.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 25_000_000
MAX_BYTES = 50_000_000

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


def load_image(path: str, processor: ImageProcessor, where: str = "") -> Tensor:
    """The file's tiles as uint8 [3, size, size], or [n, 3, size, size] where a picture has several.

    Raises:
        DataError: the file is missing, too large, not JPEG, PNG or WEBP, or damaged. It names the path and `where`.
    """
    with _opened(path, where) as image:
        return processor.tiles(image)


def image_size(path: str, where: str = "") -> tuple[int, int]:
    """Width and height of a file in pixels, from its header. Raises DataError as `load_image` does."""
    with _opened(path, where) as image:
        return image.size


@contextmanager
def _opened(path: str, where: str) -> Iterator[Image.Image]:
    """The file, its header checked; what goes wrong inside is a DataError, too."""
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
            yield image
    except DataError as error:
        error.where = error.where or at
        raise
    except _DAMAGED as error:
        raise DataError(
            "an image cannot be read",
            where=at,
            why=f"{type(error).__name__}: {error}",
            do="replace the file; JPEG, PNG and WEBP are read",
        ) from error


class TileReader:
    """Tiles by path. The first images read stay in memory, as bytes, up to `cache_bytes`: a data set
    is read in another order each epoch, so an image that was dropped would be the next one asked for as likely as any.
    """

    def __init__(self, processor: ImageProcessor, cache_bytes: int = 256 << 20) -> None:
        self.processor = processor
        self._room = cache_bytes
        self._cache: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Pixels a side of a tile."""
        return self.processor.size

    def tile(self, path: str, where: str = "") -> Tensor:
        """fp32 [3, size, size], or [n, 3, size, size]. Raises DataError as `load_image` does."""
        image = self._cache.get(path)
        if image is None:
            image = load_image(path, self.processor, where)
            with self._lock:
                if path not in self._cache and image.nbytes <= self._room:
                    self._cache[path] = image
                    self._room -= image.nbytes
        return self.processor.normalize(image)
