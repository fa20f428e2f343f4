"""Every tower against an implementation that is not ours, from its files: 20 random shapes each, fp32. CLIP and SigLIP
against transformers, EVA02-CLIP against plain_eva.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from models.placement import fill
from models.vision.tower import Tower, make_tower
from models.weights.towers import open_vision
from tests.models.parity import hf_models, plain_eva
from tests.models.tiny import assert_close

SEEDS = range(20)
TILES = 2
Feature = Literal["patch", "cls_patch"]
States = Callable[[Tensor], list[Tensor]]  # tiles -> what enters the first block and what leaves each, [N, P, W]


def our_tower(path: Path, select_layer: int, select_feature: Feature, bits: int = 16) -> Tower:
    source = open_vision(path, select_layer=select_layer, select_feature=select_feature)
    with torch.device("meta"):
        tower = make_tower(source.config)
    fill(
        tower, source.stream(), bits=lambda name: bits, device=torch.device("cpu"), dtype=torch.float32,
        source=str(path),
    )  # fmt: skip
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    return tower.eval()


def of_transformers(draw: random.Random, family: str, seed: int, folder: Path) -> tuple[States, Path, int, int]:
    theirs = hf_models.tower(hf_models.TOWERS[family](draw), seed)
    path = hf_models.save(theirs, folder)

    def states(tiles: Tensor) -> list[Tensor]:
        return list(theirs(tiles, output_hidden_states=True).hidden_states)

    return states, path, theirs.config.num_hidden_layers, theirs.config.image_size


def of_eva(draw: random.Random, seed: int, folder: Path) -> tuple[States, Path, int, int]:
    shape = plain_eva.random_shape(draw)
    weights = plain_eva.random_weights(shape, seed)
    path = folder / "weights.pt"
    outer = draw.choice((None, "model", "module", "state_dict"))
    torch.save(weights if outer is None else {outer: weights}, path)

    def states(tiles: Tensor) -> list[Tensor]:
        images = [plain_eva.hidden_states(weights, shape, tile) for tile in tiles]
        return [torch.stack(layer) for layer in zip(*images, strict=True)]

    return states, path, shape.layers, shape.patch * shape.grid


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", ["clip", "siglip", "eva"])
def test_features_and_gradients_of_the_tiles(family: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{family} {seed}")
    found = of_eva(draw, seed, tmp_path) if family == "eva" else of_transformers(draw, family, seed, tmp_path)
    states, path, layers, side = found
    select_layer = draw.choice([-2, -2, -1, -(layers + 1), 1, layers])
    feature: Feature = draw.choice(("patch", "cls_patch"))
    torch.manual_seed(seed)
    expected_tiles, tiles = (
        torch.randn(TILES, 3, side, side, generator=torch.Generator().manual_seed(seed)) for _ in "ab"
    )
    expected = states(expected_tiles.requires_grad_())[select_layer]
    if family != "siglip" and feature == "patch":  # SigLIP has no class token
        expected = expected[:, 1:]
    got = our_tower(path, select_layer, feature)(tiles.requires_grad_(), None, None)
    assert_close(got.detach(), expected.detach(), f"layer {select_layer} of {layers}, {feature}")
    weights = torch.randn(expected.shape) / expected[0].numel() ** 0.5
    expected_gradient = torch.autograd.grad((expected * weights).sum(), expected_tiles)[0]
    assert_close(torch.autograd.grad((got * weights).sum(), tiles)[0], expected_gradient, "gradient of the tiles")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_four_bits_agree_with_bitsandbytes(family: str, tmp_path: Path) -> None:
    """The same files, quantised by bitsandbytes as transformers loads them, and by our own rule."""
    draw = random.Random(f"{family} nf4")
    config = hf_models.TOWERS[family](draw)
    config.update({"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192, "num_hidden_layers": 3})
    model = hf_models.tower(config, 5)
    path = hf_models.save(model, tmp_path)
    tiles = torch.randn(TILES, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    exact = model(tiles, output_hidden_states=True).hidden_states[-2]
    theirs = hf_models.load_in_four_bits(type(model), path)
    with torch.no_grad():
        expected = theirs(tiles, output_hidden_states=True).hidden_states[-2]
        got = our_tower(path, -2, "cls_patch", bits=4)(tiles, None, None)
    assert_close(got, expected, "features")
    assert (got - exact).abs().max() > 1e-2
