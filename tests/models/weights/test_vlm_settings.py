"""What config.json says of the seam between tower and language model, in LLaVA's, Bunny's and transformers' keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import Config
from engine.tower_choice import named_tower
from models.weights.errors import WeightsError
from models.weights.settings import Settings
from models.weights.vlm_settings import VLMSettings, is_vlm, vlm_settings

LLAVA_NEXT = {  # of lmms-lab's published 8B, without its language model
    "model_type": "llava_llama", "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu", "mm_projector_lr": 2e-05,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "use_mm_proj": True, "unfreeze_mm_vision_tower": True, "tune_mm_mlp_adapter": False,
    "tokenizer_model_max_length": 6144, "mm_resampler_type": None,
}  # fmt: skip
SIZES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT = VLMSettings(
    tower="openai/clip-vit-large-patch14-336", projector="mlp2x_gelu", merge="spatial_unpad", aspect_ratio="anyres",
    grid_pinpoints=SIZES, tower_trained=True, max_length=6144,
)  # fmt: skip
HUGGING_FACE = {
    "model_type": "llava_next", "text_config": {}, "vision_config": {"model_type": "clip_vision_model"},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
    "image_grid_pinpoints": [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]],
}  # fmt: skip


def read(values: dict[str, object], projector: str = "mlp2x_gelu") -> VLMSettings:
    return vlm_settings(Settings(Path("config.json"), values), projector)


def test_llava_next() -> None:
    assert read(LLAVA_NEXT) == NEXT


@pytest.mark.parametrize(
    "text", ["[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]",
             "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"],
)  # fmt: skip
def test_old_files_have_the_grid_as_text(text: str) -> None:
    assert read(LLAVA_NEXT | {"image_grid_pinpoints": text}) == NEXT


def test_bunny() -> None:
    values = {
        "model_type": "bunny-phi", "mm_vision_tower": "/home/him/siglip", "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad", "use_s2": False, "unfreeze_vision_tower": True, "tokenizer_model_max_length": 2048,
    }  # fmt: skip
    assert read(values) == VLMSettings(
        tower="/home/him/siglip", projector="mlp2x_gelu", aspect_ratio="pad", tower_trained=True, max_length=2048
    )


def test_bunny_at_several_sizes() -> None:
    values: dict[str, object] = {"model_type": "bunny-phi3", "mm_vision_tower": "siglip", "use_s2": True}
    assert read(values).scales == (384, 768, 1152)  # where nothing is said, as in Bunny
    assert read(values | {"s2_scales": "672, 336"}).scales == (336, 672)
    with pytest.raises(WeightsError, match="s2_scales is '384;768'; expected pixels"):
        read(values | {"s2_scales": "384;768"})


def test_keys_that_the_first_ones_leave_out() -> None:
    """Imp's linear projector and LLaVA's flat merging are their code's defaults."""
    assert read({"mm_vision_tower": "x"}, "linear") == VLMSettings(tower="x", projector="linear")
    assert read({"mm_vision_tower": "x", "mm_projector_type": "linear"}, "") == VLMSettings(
        tower="x", projector="linear"
    )


def test_transformers_counts_height_before_width() -> None:
    found = read(HUGGING_FACE)
    assert found == replace(NEXT, tower="", max_length=None)
    assert found.grid_pinpoints == SIZES  # ties between sizes are decided by LLaVA's order
    assert read(HUGGING_FACE | {"tokenizer_model_max_length": 6144, "mm_vision_tower": NEXT.tower}) == NEXT


@pytest.mark.parametrize("model_type", ["imp", "imp_phi3"])
def test_imp_means_the_siglip_of_its_time(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name stays as it was typed, for what is written; what is opened has the revision."""
    monkeypatch.chdir(tmp_path)
    siglip = "google/siglip-so400m-patch14-384"
    values = {"model_type": model_type, "mm_vision_tower": siglip}
    found = read(values)
    assert (found.tower, found.tower_source) == (siglip, f"{siglip}@imp")
    assert named_tower(Config(), found, None)[0] == Path(f"{siglip}@imp")
    for other in ({"model_type": "bunny-phi"}, {"mm_vision_tower": NEXT.tower}, {"mm_vision_tower": "siglip"}):
        again = read(values | other)
        assert again.tower_source == again.tower
    (tmp_path / siglip).mkdir(parents=True)
    assert found.tower_source == siglip  # a folder is what it is


def test_transformers_llava() -> None:
    values = HUGGING_FACE | {"model_type": "llava", "image_aspect_ratio": "pad", "vision_feature_layer": -1}
    assert read(values) == VLMSettings(
        tower="", projector="mlp2x_gelu", select_layer=-1, aspect_ratio="pad", tower_trained=True
    )


@pytest.mark.parametrize(
    ("tower", "strategy", "feature"),
    [("clip_vision_model", "full", "cls_patch"), ("siglip_vision_model", "full", "patch")],
)
def test_full_has_the_class_token_where_the_tower_has_one(tower: str, strategy: str, feature: str) -> None:
    values = {"vision_config": {"model_type": tower}, "vision_feature_select_strategy": strategy}
    assert read(HUGGING_FACE | values).select_feature == feature


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LLAVA_NEXT | {"use_s2": True}, "use_s2 true is not supported"),
        (LLAVA_NEXT | {"mm_use_im_start_end": True}, "tokens around an image"),
        (LLAVA_NEXT | {"mm_use_im_patch_token": True}, "mm_use_im_patch_token true"),
        (LLAVA_NEXT | {"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer'"),
        (LLAVA_NEXT | {"mm_projector_type": "linear"}, "is 'linear', and the tensors are those of 'mlp2x_gelu'"),
        (LLAVA_NEXT | {"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9' .* square, pad, anyres"),
        (LLAVA_NEXT | {"mm_patch_merge_type": "spatial_maxpool2x2"}, "accepted are flat, spatial, spatial_unpad"),
        (LLAVA_NEXT | {"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer is \[-2, -5\]"),
        (LLAVA_NEXT | {"image_grid_pinpoints": "(1x1),...,(6x6)"}, "expected a list of pairs"),
        (LLAVA_NEXT | {"image_grid_pinpoints": [[336, 0]]}, "expected a list of pairs"),
        (LLAVA_NEXT | {"mm_vision_tower": 3}, "mm_vision_tower is 3; expected a string"),
        (HUGGING_FACE | {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        (HUGGING_FACE | {"multimodal_projector_bias": False}, "multimodal_projector_bias False"),
        (HUGGING_FACE | {"vision_config": {"model_type": "siglip_vision_model"}}, "drops the first patch"),
        (HUGGING_FACE | {"vision_config": {"model_type": "siglip2_vision_model"}}, "'siglip2_vision_model'; supported"),
        (HUGGING_FACE | {"vision_config": {"model_type": "pixtral"}}, "'pixtral'; supported are clip, clip_vision"),
    ],
)
def test_what_is_not_computed_is_refused_by_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read(values)


def test_which_files_are_of_a_vision_language_model() -> None:
    assert [is_vlm(Settings(Path(), v)) for v in (LLAVA_NEXT, HUGGING_FACE, {"model_type": "llama"})] == [
        True, True, False,
    ]  # fmt: skip
