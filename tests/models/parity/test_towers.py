"""Every tower against an implementation that is not ours, from its files: 20 random shapes each, fp32. CLIP and SigLIP
against transformers, EVA02-CLIP against plain_eva.py."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from models.vision.tower import Tower, make_tower
from models.weights.towers import open_vision
from tests.models.drawn import filled
from tests.models.parity import hf_models, plain_eva
from tests.models.tiny import assert_close

SEEDS, FEW_SEEDS = range(20), range(5)
TILES = 2
Feature = Literal["patch", "cls_patch"]
States = Callable[[Tensor], list[Tensor]]  # tiles -> what enters the first block and what leaves each, [N, P, W]


def our_tower(path: Path, select_layer: int, select_feature: Feature, bits: int = 16) -> Tower:
    source = open_vision(path, select_layer=select_layer, select_feature=select_feature)
    with torch.device("meta"):
        tower = make_tower(source.config)
    return filled(tower, source.stream(), lambda name: bits).requires_grad_(False).eval()


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
    return partial(eva_states, weights, shape), path, shape.layers, shape.patch * shape.grid


def eva_states(weights: dict[str, Tensor], shape: plain_eva.Shape, tiles: Tensor) -> list[Tensor]:
    images = [plain_eva.hidden_states(weights, shape, tile) for tile in tiles]
    return [torch.stack(layer) for layer in zip(*images, strict=True)]


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


@pytest.mark.parametrize("seed", FEW_SEEDS)
@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_four_bits_agree_with_bitsandbytes(family: str, seed: int, tmp_path: Path) -> None:
    """The same files, quantised by bitsandbytes as transformers loads them, and by our own rule."""
    config = hf_models.TOWERS[family](random.Random(f"{family} nf4 {seed}"), hf_models.WHOLE_BLOCKS)
    model = hf_models.tower(config, seed)
    path = hf_models.save(model, tmp_path)
    theirs = hf_models.load_in_four_bits(type(model), path)
    tiles = tiles_of(config.image_size)
    exact, expected = (m(tiles, output_hidden_states=True).hidden_states[-2] for m in (model, theirs))
    assert_four_bits(our_tower(path, -2, "cls_patch", bits=4), tiles, expected, exact)


@pytest.mark.parametrize("seed", FEW_SEEDS)
@torch.no_grad()
def test_four_bits_of_eva_are_those_of_bitsandbytes(seed: int, tmp_path: Path) -> None:
    """plain_eva.py, its blocks' matrices rounded by bitsandbytes."""
    shape = plain_eva.random_shape(random.Random(f"eva nf4 {seed}"), hf_models.WHOLE_BLOCKS.mlp)
    weights = plain_eva.random_weights(shape, seed)
    torch.save(weights, tmp_path / "weights.pt")
    matrix = re.compile(r"visual\.blocks\.\d+\.(attn\.\w*proj|mlp\.w[123])\.weight")
    rounded = {name: hf_models.rounded(w) if matrix.fullmatch(name) else w for name, w in weights.items()}
    assert sum(map(torch.equal, rounded.values(), weights.values())) == len(weights) - 7 * shape.layers
    tiles = tiles_of(shape.patch * shape.grid)
    exact, expected = (eva_states(held, shape, tiles)[-2] for held in (weights, rounded))
    assert_four_bits(our_tower(tmp_path / "weights.pt", -2, "cls_patch", bits=4), tiles, expected, exact)


def tiles_of(side: int) -> Tensor:
    return torch.randn(TILES, 3, side, side, generator=torch.Generator().manual_seed(0))


def assert_four_bits(tower: Tower, tiles: Tensor, expected: Tensor, exact: Tensor) -> None:
    """The tower gives what is expected, and that is not what 16 bits give."""
    got = tower(tiles, None, None)
    assert_close(got, expected, "features")
    assert (got - exact).abs().max() > 1e-2
