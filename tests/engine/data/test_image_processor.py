"""What towers are fed, against transformers' PIL processors: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from engine.data.anyres import Anyres
from engine.data.image_processor import ImageProcessor, processor_of
from engine.data.images import TileReader
from engine.errors import DataError
from models.vision.config import TowerConfig
from models.vision.preprocessing import CLIP, LAVIN, SIGLIP
from tests.models.shapes import tower

SIZES = [(31, 20), (20, 31), (56, 56), (200, 57), (57, 201), (1, 90), (640, 480)]


def picture(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0])
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def theirs(processor: Any, image: Image.Image) -> Tensor:
    return torch.as_tensor(np.array(processor(image, return_tensors="np")["pixel_values"][0]))


def shown(family: str, image_size: int, **options: Any) -> TowerConfig:
    """A tower that pictures are made for."""
    return tower(family, image_size=image_size, **options)


def same(ours: ImageProcessor, image: Image.Image, expected: Tensor) -> None:
    """Bytes exactly; after the division to rounding."""
    tiles = ours.tiles(image)
    assert torch.equal(tiles, undone(ours, expected)) and torch.allclose(ours.normalize(tiles), expected, atol=2e-6)


def undone(ours: ImageProcessor, expected: Tensor) -> Tensor:
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (ours.preprocessing.mean, ours.preprocessing.std)
    )
    return ((expected * deviation + mean) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["clip", "eva"])
def test_clip_and_eva(family: str, size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    ours = processor_of(shown(family, 56))
    same(ours, picture(size), theirs(processor, picture(size)))


@pytest.mark.parametrize("size", SIZES)
def test_siglip(size: tuple[int, int]) -> None:
    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=Image.Resampling.BICUBIC)
    same(processor_of(shown("siglip", 56)), picture(size), theirs(processor, picture(size)))


def test_lavin_is_not_clip() -> None:
    ours = processor_of(shown("clip", 56, select_feature="class_tokens", num_layers=6))
    assert ours == ImageProcessor(size=56) and ours.preprocessing == LAVIN and not LAVIN.crop
    assert LAVIN.mean == (0.485, 0.456, 0.406) and LAVIN.std == (0.229, 0.224, 0.225)  # ImageNet's


@pytest.mark.parametrize(("family", "colour"), [("clip", (122, 116, 104)), ("siglip", (127, 127, 127))])
def test_padded_to_a_square_of_the_mean_colour(family: str, colour: tuple[int, int, int]) -> None:
    ours = processor_of(shown(family, 16), aspect_ratio="pad")
    assert ours.preprocessing == (CLIP if family == "clip" else SIGLIP)
    red = Image.new("RGB", (16, 5), (255, 0, 0))
    tile = ours.tiles(red).permute(1, 2, 0)
    assert tile[0, 0].tolist() == tile[-1, -1].tolist() == list(colour)
    assert all(row.eq(torch.tensor([255, 0, 0])).all() for row in tile[5:10])  # from (16 - 5) // 2 on
    assert tile[4, 0].tolist() == tile[10, 0].tolist() == list(colour)
    square = picture((16, 16))
    assert torch.equal(ours.tiles(square), processor_of(shown(family, 16)).tiles(square))


@pytest.mark.parametrize("size", [s for s in SIZES if s != (56, 56)])
def test_anyres_tiles_are_those_of_llava_next(size: tuple[int, int]) -> None:
    anyres = Anyres(tile=56, tokens=16)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[[height, width] for width, height in anyres.sizes],
    )  # fmt: skip
    expected = theirs(processor, picture(size))
    ours = processor_of(shown("clip", 56), aspect_ratio="anyres", anyres=anyres)
    assert len(ours.tiles(picture(size))) == anyres.of(size).num_tiles
    same(ours, picture(size), expected[: anyres.of(size).num_tiles])


def test_a_thin_picture_takes_no_memory() -> None:
    for aspect in ("square", "pad"):
        ours = processor_of(shown("clip", 336), aspect_ratio=aspect)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="20000 x 2 pixels is too thin"):
            ours.tiles(Image.new("RGB", (20000, 2)))
    anyres = processor_of(shown("clip", 8), aspect_ratio="anyres", anyres=Anyres(tile=8, tokens=4))
    assert anyres.tiles(Image.new("RGB", (20000, 2))).shape == (3, 3, 8, 8)


def test_a_reader_gives_and_keeps_several_tiles(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture((30, 10)).save(path)
    ours = processor_of(shown("clip", 8), aspect_ratio="anyres", anyres=Anyres(tile=8, tokens=4))
    reader = TileReader(ours)
    tiles = reader.tile(str(path))
    assert tiles.shape == (4, 3, 8, 8) and tiles.dtype == torch.float32 and reader.size == 8
    path.unlink()
    assert torch.equal(reader.tile(str(path)), tiles)
