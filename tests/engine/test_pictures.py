"""What becomes of pictures: flags, and what a checkpoint says where they are `auto`."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config, longest_sample
from engine.data.image_processor import CLIP, IMAGENET
from engine.errors import UsageError
from engine.pictures import (
    Pictures,
    anyres_of,
    has_newline,
    in_order,
    processor,
    record_length,
    record_pictures,
)
from models.language.llama import LLAMA2_7B
from models.projector import ProjectorConfig
from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336
from models.vlm import VLMConfig

LLAVA_NEXT = Pictures(merge="spatial_unpad", aspect_ratio="anyres", pinpoints=((336, 672), (672, 672)))
LLAVA = VLMConfig(language=LLAMA2_7B, vision=CLIP_L_14_336, projector=ProjectorConfig(kind="mlp2x_gelu"))
LAVIN = VLMConfig(language=LLAMA2_7B, vision=CLIP_L_14_224)


def test_nobody_says_anything() -> None:
    config = Config()
    assert anyres_of(config, LLAVA) is None and in_order(config, LLAVA) and not has_newline(config, Pictures())
    square = processor(config, LLAVA)
    assert square.crop and not square.pad and square.colours == CLIP and square.size == 336
    assert processor(config, LAVIN).colours == IMAGENET and not processor(config, LAVIN).crop


def test_a_checkpoints_settings_stand_in_for_auto() -> None:
    config = Config()
    assert has_newline(config, LLAVA_NEXT)
    record_pictures(config, LLAVA_NEXT, 336)
    found = config.model.patch_merge, config.dataset.image_aspect_ratio, config.dataset.anyres_grids
    assert found == ("spatial_unpad", "anyres", "1x2,2x2")
    anyres = anyres_of(config, LLAVA)
    assert anyres is not None and (anyres.sizes, anyres.tokens) == (LLAVA_NEXT.pinpoints, 576)
    assert processor(config, LLAVA).anyres == anyres and not in_order(config, LLAVA)
    record_pictures(config, Pictures(), 336)  # a run that is opened again
    assert config.dataset.anyres_grids == "1x2,2x2"


def test_flags_win() -> None:
    config = Config()
    config.model.patch_merge, config.dataset.image_aspect_ratio, config.dataset.anyres_grids = "flat", "anyres", "2x2"
    record_pictures(config, LLAVA_NEXT, 336)
    anyres = anyres_of(config, LLAVA)
    assert anyres is not None and (anyres.merge, anyres.sizes) == ("flat", ((672, 672),))
    assert not has_newline(config, LLAVA_NEXT)
    config.dataset.image_aspect_ratio = "pad"
    assert processor(config, LLAVA).pad and anyres_of(config, LLAVA) is None


@pytest.mark.parametrize(
    ("model", "aspect_ratio", "said", "flag", "length"),
    [
        (LAVIN, "square", Pictures(), None, 512),
        (LLAVA, "square", Pictures(), None, 2048),
        (LLAVA, "anyres", LLAVA_NEXT, None, 4096),
        (LLAVA, "anyres", Pictures(max_length=6144), None, 6144),
        (LLAVA, "square", Pictures(max_length=6144), 1024, 1024),
    ],
)
def test_the_length_of_a_sample(
    model: VLMConfig, aspect_ratio: Any, said: Pictures, flag: int | None, length: int
) -> None:
    config = Config()
    config.dataset.image_aspect_ratio, config.dataset.max_seq_len = aspect_ratio, flag
    record_length(config, said, model)
    assert config.dataset.max_seq_len == longest_sample(config) == length


def test_what_does_not_fit_is_refused() -> None:
    config = Config()
    with pytest.raises(UsageError, match="336 x 672 pixels"):
        record_pictures(config, LLAVA_NEXT, 224)
    config.dataset.image_aspect_ratio, config.model.patch_merge = "anyres", "spatial"
    with pytest.raises(UsageError, match="a tile has 6"):
        anyres_of(config, LAVIN)
    config.dataset.anyres_grids = "2x2,0x1"
    with pytest.raises(UsageError, match="across x down"):
        anyres_of(config, LLAVA)
