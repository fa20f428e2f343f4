"""Which model a plan counts where weights are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import UsageError
from engine.flags import parse_train
from engine.plan.make import make_plan, plan_text, plan_without_weights
from engine.plan.memory_budget import largest_pack
from engine.plan.shapes import LANGUAGES, TOWERS, shapes
from models.vision.clip import CLIP_L_14_224
from models.weights.families.registry import family_named

LORA = ["--train.language", "lora", "--train.vision", "frozen", "--dataset.max_seq_len", "2048"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_folders_name_is_a_published_shape(language: str, tmp_path: Path) -> None:
    model = shapes(parse_train(["--model.language", str(tmp_path / language), *LORA])[0])
    assert model.model.language == LANGUAGES[language]
    assert "published shape" in model.name and model.weight_bytes is None


@pytest.mark.parametrize("tower", TOWERS)
def test_a_towers_name_too(tower: str, tmp_path: Path) -> None:
    line = ["--model.language", str(tmp_path / "phi-2"), "--model.vision", f"some/{tower}", *LORA]
    vision = shapes(parse_train(line)[0]).model.vision
    known = TOWERS[tower]
    assert (vision.family, vision.image_size, vision.select_feature) == (known.family, known.image_size, "patch")
    assert vision.layers_run == known.num_layers - 1
    lavin = shapes(parse_train(["--model.language", str(tmp_path / "7B")])[0]).model
    assert lavin.vision == CLIP_L_14_224 and lavin.has_modality_token


def test_a_config_alone_says_the_shape(tmp_path: Path) -> None:
    config = LANGUAGES["phi-1_5"]
    (tmp_path / "config.json").write_text(json.dumps(family_named("phi").settings_of(config)))
    model = shapes(parse_train(["--model.language", str(tmp_path), *LORA])[0])
    assert model.model.language == config and "no weights" in model.name


def test_neither_is_an_error_that_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no published size") as caught:
        shapes(parse_train(["--model.language", str(tmp_path / "gpt-5")])[0])
    assert "phi-2" in caught.value.do and "config.json" in caught.value.do


def test_a_towers_name_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    line = ["--model.language", str(tmp_path / "phi-2"), *LORA, "--model.vision"]
    with pytest.raises(UsageError, match="'siglip-typo' is no published one") as caught:
        shapes(parse_train([*line, "google/siglip-typo"])[0])
    assert "siglip-so400m-patch14-384" in caught.value.do
    assert shapes(parse_train([*line, "google/siglip-so400m-patch14-384@main"])[0]).model.vision.family == "siglip"


def test_the_config_alone_of_a_vision_language_model(tmp_path: Path) -> None:
    """The published LLaVA-1.6: tower, projector and tiles are those of its config.json."""
    config = family_named("llama").settings_of(LANGUAGES["vicuna-7b-v1.5"]) | {
        "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = ["--model.language", str(tmp_path), "--train.language", "frozen", "--train.vision", "frozen"]
    model = shapes(parse_train(line)[0])
    unused = 12_596_224 + 2_048  # the tower's last block and its last norm
    assert sum(make_plan(model.config, model.model, "", num_ranks=1).parameters.values()) == 7_062_906_880 - unused
    assert model.config.dataset.anyres_grids == "1x2,2x1,2x2,3x1,1x3"
    assert model.config.dataset.max_seq_len == 4096
    with pytest.raises(UsageError, match="max_seq_len 512 leaves no room") as caught:
        plan_without_weights(parse_train([*line, "--dataset.max_seq_len", "512"])[0], 1)  # nor would the run begin
    assert "--dataset.max_seq_len 4096" in caught.value.do


def test_a_plan_of_phi_and_siglip(tmp_path: Path) -> None:
    """729 tokens an image, and packs that hold the longest sample."""
    line = ["--model.language", str(tmp_path / "phi-2"), "--model.vision", "google/siglip-so400m-patch14-384", *LORA]
    plan = plan_without_weights(parse_train(line)[0], 1)
    assert plan.parameters["language"] == 2_779_683_840 and plan.tokens_per_sample == 639
    assert "samples of 639 tokens" in plan_text(plan) and plan.fits["RTX 3090"]
    assert "image features" not in plan.memory_bytes  # 1.7 MB an image
    model = shapes(parse_train(line)[0])
    pack = largest_pack(model.config, model.model)
    assert (pack.tokens, pack.tiles, pack.slots) == (2176, 2, None)


def test_a_plan_of_tiles(tmp_path: Path) -> None:
    line = ["--model.language", str(tmp_path / "vicuna-7b-v1.5"), "--model.vision", "openai/clip-vit-large-patch14-336",
            "--train.language", "frozen", "--train.vision", "frozen", "--model.projector", "mlp2x_gelu",
            "--dataset.image_aspect_ratio", "anyres", "--model.patch_merge", "spatial_unpad",
            "--dataset.max_seq_len", "4096"]  # fmt: skip
    model = shapes(parse_train(line)[0])
    pack = largest_pack(model.config, model.model)
    assert model.model.image_newline and (pack.image_tokens, pack.image_tiles) == (2928, 5)
    assert pack.tokens == 4224 == pack.slots and pack.tiles == 8
