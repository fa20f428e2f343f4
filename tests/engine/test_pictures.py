"""What becomes of pictures: flags, and what a checkpoint says where they are `auto`."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config, longest_sample
from engine.data.anyres import GRIDS
from engine.errors import UsageError
from engine.image_choices import ImageChoices, choose_images, record_images
from engine.pictures import anyres_of, in_order, processor
from models.language.llama import LLAMA2_7B
from models.projector import ProjectorConfig
from models.vision import preprocessing
from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336
from models.vision.preprocessing import CLIP
from models.vision.tower import TowerConfig
from models.vlm import VLMConfig
from models.weights.vlm_settings import VLMSettings

LLAVA_NEXT = VLMSettings(
    tower="", projector="mlp2x_gelu", merge="spatial_unpad", aspect_ratio="anyres",
    grid_pinpoints=((336, 672), (672, 672)),
)  # fmt: skip
PLAIN = VLMSettings(tower="", projector="mlp2x_gelu", max_length=6144)
LLAVA = VLMConfig(language=LLAMA2_7B, vision=CLIP_L_14_336, projector=ProjectorConfig(kind="mlp2x_gelu"))
LAVIN = VLMConfig(language=LLAMA2_7B, vision=CLIP_L_14_224)


def chosen(config: Config, tower: TowerConfig = CLIP_L_14_336, said: VLMSettings | None = None) -> ImageChoices:
    """Chosen for a LoRA, and recorded."""
    config.train.language = "lora"
    images = choose_images(config, tower, said, "auto" if said is None else said.projector)
    record_images(config, images)
    return images


def test_nobody_says_anything() -> None:
    config = Config()
    images = chosen(config)
    assert (images.aspect_ratio, images.merge, images.grids) == ("square", "flat", ()) and not images.has_newline
    assert anyres_of(config, LLAVA) is None and in_order(config, LLAVA)
    square = processor(config, LLAVA)
    assert square.preprocessing == CLIP and CLIP.crop and not square.pad and square.size == 336
    assert processor(config, LAVIN).preprocessing == preprocessing.LAVIN
    config = Config()
    config.dataset.image_aspect_ratio = "anyres"
    assert chosen(config).grids == GRIDS and config.dataset.anyres_grids == "1x2,2x1,2x2,3x1,1x3"


def test_a_checkpoints_settings_stand_in_for_auto() -> None:
    config = Config()
    images = chosen(config, said=LLAVA_NEXT)
    assert images.has_newline and images.pinpoints == LLAVA_NEXT.grid_pinpoints
    found = config.model.patch_merge, config.dataset.image_aspect_ratio, config.dataset.anyres_grids
    assert found == ("spatial_unpad", "anyres", "1x2,2x2")
    anyres = anyres_of(config, LLAVA)
    assert anyres is not None and (anyres.sizes, anyres.tokens) == (LLAVA_NEXT.grid_pinpoints, 576)
    assert processor(config, LLAVA).anyres == anyres and not in_order(config, LLAVA)
    assert chosen(config) == images  # a run that is opened again, without the checkpoint's settings


def test_flags_win() -> None:
    config = Config()
    config.model.patch_merge, config.dataset.image_aspect_ratio, config.dataset.anyres_grids = "flat", "anyres", "2x2"
    images = chosen(config, said=LLAVA_NEXT)
    anyres = anyres_of(config, LLAVA)
    assert anyres is not None and (anyres.merge, anyres.sizes) == ("flat", ((672, 672),))
    assert not images.has_newline
    config.dataset.image_aspect_ratio = "pad"
    assert processor(config, LLAVA).pad and anyres_of(config, LLAVA) is None


@pytest.mark.parametrize(
    ("model", "aspect_ratio", "said", "flag", "length"),
    [
        (LAVIN, "square", None, None, 512),
        (LLAVA, "square", None, None, 2048),
        (LLAVA, "anyres", LLAVA_NEXT, None, 4096),
        (LLAVA, "anyres", PLAIN, None, 6144),
        (LLAVA, "square", PLAIN, 1024, 1024),
    ],
)
def test_the_length_of_a_sample(
    model: VLMConfig, aspect_ratio: Any, said: VLMSettings | None, flag: int | None, length: int
) -> None:
    config = Config()
    config.dataset.image_aspect_ratio, config.dataset.max_seq_len = aspect_ratio, flag
    images = choose_images(config, model.vision, said, model.projector.kind)
    assert (images.projector.kind, images.max_length) == (model.projector.kind, length)
    record_images(config, images)
    assert config.dataset.max_seq_len == longest_sample(config) == length


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="336 x 672 pixels"):
        chosen(Config(), CLIP_L_14_224, LLAVA_NEXT)
    config = Config()
    config.dataset.image_aspect_ratio, config.model.patch_merge = "anyres", "spatial"
    chosen(config)
    with pytest.raises(UsageError, match="a tile has 6"):
        anyres_of(config, LAVIN)
    config.dataset.anyres_grids = "2x2,0x1"
    with pytest.raises(UsageError, match="across x down"):
        chosen(config)
