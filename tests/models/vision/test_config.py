"""Which tokens of which block leave a tower, and what cannot be asked for. Counts of parameters are those of
tests/models/test_counts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336
from models.vision.eva import EVA02_CLIP_L_336
from models.vision.siglip import SIGLIP_SO400M_384
from models.vision.tower import TowerConfig, make_tower
from tests.models.vision.towers import config_of


@pytest.mark.parametrize(
    ("config", "inside", "out", "run"),
    [
        (CLIP_L_14_224, 257, 6, 24), (CLIP_L_14_336, 577, 576, 23), (EVA02_CLIP_L_336, 577, 576, 23),
        (SIGLIP_SO400M_384, 729, 729, 26),
    ],
    ids=["lavin", "clip", "eva", "siglip"],
)  # fmt: skip
def test_the_towers_of_the_papers(config: TowerConfig, inside: int, out: int, run: int) -> None:
    assert (config.num_tokens, config.tokens_out, config.layers_run) == (inside, out, run)
    with torch.device("meta"):
        assert len(make_tower(config).blocks()) == run


@pytest.mark.parametrize(("layer", "run"), [(0, 0), (1, 1), (4, 4), (-1, 4), (-2, 3), (-5, 0)])
def test_layers_count_as_hidden_states(layer: int, run: int) -> None:
    config = config_of("siglip", select_layer=layer)
    assert (config.layers_run, config.taps) == (run, [run])


def test_a_family_says_what_its_blocks_are_made_of_and_what_it_was_trained_on() -> None:
    """Nothing is taken from another family where one says nothing."""

    class Silent(TowerConfig):
        family = "silent"

    shape = {"width": 8, "num_layers": 2, "num_heads": 2, "patch_size": 4, "image_size": 8, "mlp_dim": 8}
    with pytest.raises(TypeError, match="parts"):
        Silent(**shape, norm_eps=1e-5)  # type: ignore[abstract, arg-type]
    half: Any = type("Half", (Silent,), {"parts": lambda self: None})
    with pytest.raises(AttributeError, match="trained_on"):
        assert half(**shape, norm_eps=1e-5).preprocessing


def test_class_tokens_come_from_six_blocks() -> None:
    assert CLIP_L_14_224.taps == [4, 8, 12, 16, 20, 24]
    assert config_of("eva", num_layers=7, select_feature="class_tokens", select_layer=99).taps == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("clip", {"select_layer": 5}, "accepted are -5 to 4"),
        ("eva", {"select_layer": -6}, "accepted are -5 to 4"),
        ("siglip", {"select_feature": "class_tokens", "num_layers": 6}, "siglip has no class token; choose 'patch'"),
        ("clip", {"select_feature": "class_tokens", "num_layers": 5}, "at least 6"),
        ("clip", {"select_feature": "cls"}, "accepted are class_tokens, patch, cls_patch"),
        ("eva", {"num_heads": 5}, "5 heads"),
        ("siglip", {"patch_size": 14}, "patches of 14 pixels do not fit in tiles of 13"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(family, **options)
