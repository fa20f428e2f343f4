"""S2: a tower that sees a picture at several sizes, against its definition in fp64, crop by crop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.adapters.mma import AdapterConfig
from models.language.phi3 import PHI3_MINI
from models.projector import ProjectorConfig, make_projector
from models.vision.siglip import SIGLIP_SO400M_384
from models.vision.tower import Tower, TowerConfig, make_tower
from models.vlm import VLMConfig
from tests.models import shapes
from tests.models.drawn import drawn
from tests.models.shapes import WIDTH

SIDE = 10  # pixels of the tower: 3 patches of 3 a side, and a pixel that none sees
SHAPE = {"patch_size": 3, "image_size": SIDE}


def tower(scales: tuple[int, ...]) -> Tower:
    return drawn(make_tower(shapes.tower("siglip", **SHAPE, scales=scales))).double()


def plain(one_size: Tower, pictures: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Each scale's crops one by one, put together row by row, and reduced by torch's area interpolation."""
    parts = []
    for scale in scales:
        n = scale // SIDE
        small = F.interpolate(pictures, size=(scale, scale), mode="bicubic", align_corners=False)
        rows = []
        for i in range(n):
            crops = [small[:, :, i * SIDE : (i + 1) * SIDE, j * SIDE : (j + 1) * SIDE] for j in range(n)]
            maps = [one_size(crop, None, None).permute(0, 2, 1).unflatten(2, (3, 3)) for crop in crops]
            rows.append(torch.cat(maps, dim=3))
        parts.append(F.interpolate(torch.cat(rows, dim=2), size=(3, 3), mode="area"))
    return torch.cat(parts, dim=1).flatten(2).permute(0, 2, 1)


@pytest.mark.parametrize("scales", [(10, 20, 30), (10, 30), (10,)])
def test_it_is_its_definition(scales: tuple[int, ...]) -> None:
    made, one_size = tower(scales), tower(())
    pictures = torch.randn(2, 3, max(scales), max(scales), dtype=torch.float64)
    got, expected = made(pictures, None, None), plain(one_size, pictures, scales)
    assert got.shape == (2, 9, len(scales) * WIDTH) == (2, made.config.tokens_out, made.config.feature_width)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(got.shape, dtype=torch.float64)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), other in zip(made.named_parameters(), one_size.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-8, msg=name)


@torch.no_grad()
def test_a_picture_is_routed_by_another() -> None:
    """Adapters of each crop by the same crop of the picture that routes."""
    made = tower((10, 20))
    made.add_adapters(AdapterConfig(dim=8), "router", 0, legacy_normal=False)
    for name, parameter in made.named_parameters():
        if "_adapter." in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    pictures = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    router = torch.zeros(2, dtype=torch.int64)
    alone = made(pictures[:1], None, None)
    routed, own = made(pictures, router, None), made(pictures, None, None)
    torch.testing.assert_close(routed[:1], alone)
    torch.testing.assert_close(own[:1], alone)
    assert (routed[1] - own[1]).abs().max() > 1e-3


def test_published_numbers() -> None:
    """Bunny-v1.1: mm_hidden_size 3456, 14 crops, 729 tokens."""
    config = replace(SIGLIP_SO400M_384, scales=(384, 768, 1152))
    assert (config.feature_width, config.crops, config.tokens_out, config.picture_size) == (3456, 14, 729, 1152)
    one = SIGLIP_SO400M_384
    assert (one.feature_width, one.crops, one.picture_size) == (1152, 1, 384)
    vlm = VLMConfig(language=PHI3_MINI, vision=config, projector=ProjectorConfig(kind="mlp2x_gelu"))
    assert vlm.tokens_per_tile == 729
    with torch.device("meta"):
        projector = make_projector(vlm.projector, config.feature_width, PHI3_MINI.dim)
    assert projector.state_dict()["layers.0.weight"].shape == (3072, 3456)


@pytest.mark.parametrize(
    ("config", "scales", "message"),
    [
        (shapes.tower("clip", **SHAPE), (10, 20), "S2's scales with a clip tower"),
        (shapes.tower("eva", **SHAPE), (10, 20), "S2's scales with a eva tower"),
        (shapes.tower("siglip", **SHAPE), (10, 15), "rising multiples of 10"),
        (shapes.tower("siglip", **SHAPE), (20, 30), "that itself the first"),
        (shapes.tower("siglip", **SHAPE), (10, 30, 20), "rising multiples of 10"),
    ],
)
def test_scales_that_cannot_be(config: TowerConfig, scales: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, scales=scales)
