from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.image_processor import ImageProcessor
from engine.data.images import TileReader, load_image
from engine.errors import DataError
from models.vision.preprocessing import LAVIN

SMALL = ImageProcessor(size=8)


def noise(height: int = 20, width: int = 31, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(kind: str, array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_squashed_by_pil_on_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.xyz"  # the content decides, not the name
    path.write_bytes(encoded(kind, noise()))
    expected = np.asarray(Image.open(path).convert("RGB").resize((14, 14), Image.Resampling.BICUBIC))
    loaded = load_image(str(path), ImageProcessor(size=14))
    assert loaded.dtype == torch.uint8 and loaded.shape == (3, 14, 14)
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), expected)
    want = (expected.astype(np.float64) / 255 - np.array(LAVIN.mean)) / np.array(LAVIN.std)
    tile = TileReader(ImageProcessor(size=14)).tile(str(path))
    assert tile.dtype == torch.float32 and tile.shape == (3, 14, 14)
    assert np.allclose(tile.permute(1, 2, 0).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image"
    Image.fromarray(noise()).convert("L" if mode == "I;16" else mode.replace("LA", "LA")).convert(mode).save(
        path, "JPEG" if mode == "CMYK" else "PNG"
    )
    assert load_image(str(path), SMALL).shape == (3, 8, 8)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    image = Image.fromarray(noise())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    assert torch.equal(load_image(str(tmp_path / "turned.png"), SMALL), load_image(str(tmp_path / "plain.png"), SMALL))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "UnidentifiedImageError"),
    "text": (b"<html>not found</html>", "UnidentifiedImageError"),
    "gif": (encoded("GIF", noise()), "UnidentifiedImageError"),
    "bmp": (encoded("BMP", noise()), "UnidentifiedImageError"),
    "cut": (encoded("PNG", noise())[:-200], "truncated"),
    "cut_jpeg": (encoded("JPEG", noise())[:-300], "truncated"),
    "too_large": (png_claiming(5001, 5000), "5001 x 5000 pixels, the limit is 25000000"),
    "bomb": (png_claiming(60_000, 60_000), "DecompressionBombError"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_image_names_file_and_row(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_image(str(path), SMALL, "my.json, row 12")
    assert message in str(caught.value)
    assert caught.value.where == f"my.json, row 12: {path}"


def test_missing_folder_and_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("none.png", "cannot be read"), (".", "not a regular"), ("fifo", "not a regular")):
        with pytest.raises(DataError, match=message):
            load_image(str(tmp_path / name), SMALL)


def test_a_file_too_large_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(DataError, match="50000001 bytes, the limit is 50000000"):
        load_image(str(path), SMALL)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore:.*")  # Pillow warns about some of what it reads
def test_damaged_files_give_a_tile_or_a_data_error(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    good = np.frombuffer(encoded(kind, noise()), dtype=np.uint8)
    path = tmp_path / "image"
    failed = 0
    for _ in range(300):
        bad = good.copy()
        for place in rng.integers(0, min(len(bad), rng.choice([40, len(bad)])), rng.integers(1, 6)):
            bad[place] = rng.integers(0, 256)
        path.write_bytes(bad[: rng.choice([len(bad), rng.integers(0, len(bad))])].tobytes())
        try:
            assert load_image(str(path), ImageProcessor(size=4)).shape == (3, 4, 4)
        except DataError:
            failed += 1
    assert 100 < failed < 300


def test_cache_keeps_what_fits_and_nothing_else(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    first, second = write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png", (200, 0, 0))
    reader = TileReader(SMALL, cache_bytes=3 * 8 * 8)
    a, b = reader.tile(str(first)), reader.tile(str(second))
    assert torch.equal(a, SMALL.normalize(load_image(str(first), SMALL))) and not torch.equal(a, b)
    first.unlink()
    second.unlink()
    assert torch.equal(reader.tile(str(first)), a)
    with pytest.raises(DataError, match="cannot be read"):
        reader.tile(str(second))
