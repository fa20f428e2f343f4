"""--to llava-hf: transformers computes the same logits from it, and what is read back is what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.export.llava_hf import new_tokens, plan_llava_hf
from models.weights.checkpoint import open_checkpoint
from models.weights.write.llava import FormatError
from tests.engine.export import made_up
from tests.engine.export.made_up import (
    ANYRES,
    GRID,
    IMAGE,
    PATCH,
    VOCABULARY,
    assert_same_tensors,
    export_config,
    language_folder,
    origin_of,
    origin_tensors,
    project,
    settings_of,
    tensors_of,
    tower_folder,
    transformers,
)  # fmt: skip

CLIP_TOWER, SIGLIP_TOWER = transformers.CLIPVisionModel, transformers.SiglipVisionModel
BEFORE, AFTER = [1, 5, 6], [7, 8, 9, 10]


def served(folder: Path, family: str, tower: str, template: str = "auto", **settings: Any) -> tuple[Any, Path]:
    """-> (the origin, the exported folder)."""
    language, tower_path = language_folder(folder / "language", family), tower_folder(folder / "tower", tower)
    origin = origin_of(language, tower_path, settings_of(tower_path, **settings))
    output = folder / "out"
    output.mkdir()
    plan_llava_hf(origin, export_config(output, template=template)).write(output)
    return origin, output


def loaded(kind: Any, folder: Path) -> Any:
    """A model of transformers that finds every tensor it has, and no other."""
    model, info = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def features(tower: str, folder: Path, tiles: Tensor, keep_class_token: bool = False) -> Tensor:
    """The last layer but one, [N, P, W], by the tower alone."""
    model = (CLIP_TOWER if tower == "clip" else SIGLIP_TOWER).from_pretrained(folder, attn_implementation="eager")
    found = model(tiles, output_hidden_states=True).hidden_states[-2]
    return found[:, 1:] if tower == "clip" and not keep_class_token else found


def expected_logits(folder: Path, image: Tensor) -> Tensor:
    """Of BEFORE, the image's embeddings [K, D], AFTER, by the language model alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "language", attn_implementation="eager").eval()
    embed = model.get_input_embeddings()
    x = torch.cat((embed(torch.tensor(BEFORE)), image, embed(torch.tensor(AFTER))))
    return model(inputs_embeds=x[None]).logits[0]


def same_logits(model: Any, folder: Path, image: Tensor, **pictures: Tensor) -> None:
    ids = [*BEFORE, *[model.config.image_token_index] * image.shape[0], *AFTER]
    got = model(input_ids=torch.tensor([ids]), **pictures).logits[0]
    expected = expected_logits(folder, image)
    assert got.shape[1] % 64 == 0
    torch.testing.assert_close(got[:, :VOCABULARY], expected, rtol=1e-5, atol=1e-5)
    assert (got[:, VOCABULARY:] < got[:, :VOCABULARY].amax(1, keepdim=True)).all()  # a new token is never the answer


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "stablelm"])
@torch.no_grad()
def test_llava_has_the_same_logits_and_comes_back_bit_for_bit(tmp_path: Path, family: str, tower: str) -> None:
    origin, output = served(tmp_path, family, tower, aspect_ratio="pad")
    model = loaded(transformers.LlavaForConditionalGeneration, output)
    assert model.config.vision_feature_select_strategy == ("default" if tower == "clip" else "full")
    tile = torch.randn(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))
    image = project(origin, features(tower, tmp_path / "tower", tile)[0])
    same_logits(model, tmp_path, image, pixel_values=tile)

    back = open_checkpoint(output)
    assert back.settings == settings_of(tmp_path / "tower", aspect_ratio="pad", tower_trained=True)
    got, whole = tensors_of(back), origin_tensors(origin)
    for name in ("language.embed.weight", "language.head.weight"):
        assert got[name].shape[0] == 128
        got[name] = got[name][:VOCABULARY]
    assert_same_tensors(got, whole)


@torch.no_grad()
def test_the_class_token_stays_where_it_was_trained_with(tmp_path: Path) -> None:
    origin, output = served(tmp_path, "llama", "clip", select_feature="cls_patch")
    model = loaded(transformers.LlavaForConditionalGeneration, output)
    tile = torch.randn(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))
    image = project(origin, features("clip", tmp_path / "tower", tile, keep_class_token=True)[0])
    same_logits(model, tmp_path, image, pixel_values=tile)
    open_again = open_checkpoint(output)
    assert open_again.settings is not None and open_again.settings.select_feature == "cls_patch"


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_llava_next_puts_tiles_together_as_llava(tmp_path: Path, tower: str) -> None:
    """A picture of two squares side by side fills a grid of one row: base, then rows with a newline each."""
    origin, output = served(tmp_path, "llama", tower, **ANYRES)
    model = loaded(transformers.LlavaNextForConditionalGeneration, output)
    tiles = torch.randn(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))
    side = IMAGE // PATCH
    base, left, right = project(origin, features(tower, tmp_path / "tower", tiles)).unflatten(1, (side, side))
    rows = torch.cat((left, right, origin.image_newline.expand(side, 1, -1)), dim=1)
    image = torch.cat((base.flatten(0, 1), rows.flatten(0, 1)))
    sizes = torch.tensor([[IMAGE, 2 * IMAGE]])  # (height, width)
    same_logits(model, tmp_path, image, pixel_values=tiles[None], image_sizes=sizes)

    back = open_checkpoint(output)
    assert back.settings == settings_of(tmp_path / "tower", **ANYRES, tower_trained=True)
    assert back.image_newline is not None and torch.equal(back.image_newline, origin.image_newline)


def test_llava_next_decides_ties_as_llava(tmp_path: Path) -> None:
    """A picture that fits a tile fits every grid as well: LLaVA takes the first one, which is the tall one."""
    _, output = served(tmp_path, "llama", "clip", **ANYRES)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((output / name).read_text())["image_grid_pinpoints"] == [[h, w] for w, h in GRID]
    processor = transformers.AutoProcessor.from_pretrained(output)
    pixels = processor.image_processor(Image.fromarray(np.zeros((IMAGE, IMAGE, 3), np.uint8)), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 3, IMAGE, IMAGE)
    inputs = processor(text="w1 <image> w2", images=Image.fromarray(np.zeros((IMAGE, IMAGE, 3), np.uint8)))
    # 3 x 3 patches of the base; of the tall grid's 6 rows, (6 - 3) // 2 are cut off above and below: 4 rows of 3
    # patches and a newline. The wide grid would have 3 rows of 4 patches and a newline.
    assert sum(i == processor.image_token_id for i in inputs["input_ids"][0]) == 9 + 4 * 4


@pytest.mark.parametrize(
    ("tower", "ratio"), [("clip", "square"), ("clip", "pad"), ("siglip", "square"), ("siglip", "pad")]
)
def test_the_processor_counts_the_tokens_that_the_model_has(tmp_path: Path, tower: str, ratio: str) -> None:
    _, output = served(tmp_path, "llama", tower, aspect_ratio=ratio)
    processor = transformers.AutoProcessor.from_pretrained(output)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 30, 3), np.uint8))
    inputs = processor(text="w1 <image> w2", images=picture, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE, IMAGE)
    ids = inputs["input_ids"][0].tolist()
    assert ids == [1, 4, *[VOCABULARY] * (IMAGE // PATCH) ** 2, 5]
    if ratio == "pad":  # rows above and below the picture have the mean colour, which becomes nearly nothing
        assert inputs["pixel_values"][0, :, 0].abs().max() < 0.02
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token == "<unk>"


def test_a_conversation_is_tokenized_with_one_begin_token(tmp_path: Path) -> None:
    _, output = served(tmp_path, "llama", "clip")
    processor = transformers.AutoProcessor.from_pretrained(output)
    picture = Image.fromarray(np.zeros((IMAGE, IMAGE, 3), np.uint8))
    content = [{"type": "text", "text": "w7"}, {"type": "image", "image": picture}]
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"][0]
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    assert ids.count(1) == 1 and ids[0] == 1
    assert ids.count(VOCABULARY) == (IMAGE // PATCH) ** 2
    first = ids.index(VOCABULARY)
    assert 10 not in ids[:first] and 10 in ids[first:]  # w7 stands behind the picture


def test_the_exported_tokenizer_knows_the_image_by_its_id(tmp_path: Path) -> None:
    _, output = served(tmp_path, "llama", "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY
    assert tokenizer("w0<image>w1").input_ids == [1, 3, VOCABULARY, 4]
    assert json.loads((output / "config.json").read_text())["image_token_index"] == VOCABULARY


def test_llama_3_gets_a_pad_token_before_the_image(tmp_path: Path) -> None:
    """A tokenizer without padding and unknown words: <pad> has the first free id, as in LLaVA, <image> the next."""
    language, tower = language_folder(tmp_path / "l", "llama"), tower_folder(tmp_path / "t", "clip")
    config = json.loads((language / "tokenizer_config.json").read_text())
    del config["unk_token"]
    (language / "tokenizer_config.json").write_text(json.dumps(config))
    (language / "special_tokens_map.json").unlink(missing_ok=True)
    origin = origin_of(language, tower, settings_of(tower))
    parts = made_up.parts_of(origin, vocabulary=64)
    assert new_tokens(language, parts) == {"<pad>": 61, "<image>": 62}
    said = {**parts.language.said, "pad_token_id": 61}
    assert new_tokens(language, made_up.parts_of(origin, vocabulary=62, said=said)) == {"<pad>": 61, "<image>": 62}


def test_llama_3_ends_its_answers_with_eot(tmp_path: Path) -> None:
    """Its config.json names another token, which no answer of training ends with."""
    _, output = served(tmp_path, "llama", "clip", template="llava_llama_3")
    for file, key in (("generation_config.json", None), ("config.json", "text_config")):
        content = json.loads((output / file).read_text())
        assert (content if key is None else content[key])["eos_token_id"] == [2, 128009]
    text = (output / "chat_template.jinja").read_text()
    assert "<|eot_id|>" in text and json.loads((output / "tokenizer_config.json").read_text())["chat_template"] == text


def test_no_template_where_none_is_asked_for(tmp_path: Path) -> None:
    _, output = served(tmp_path, "llama", "clip", template="none")
    assert not (output / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("family", "tower", "settings", "says"),
    [
        ("llama", "eva", {}, "no class for a tower of eva"),
        ("llama", "clip", {"projector": "mlp3x_gelu"}, "has the projector mlp2x_gelu, not mlp3x_gelu"),
        ("llama", "clip", {"merge": "spatial", "aspect_ratio": "anyres", "grid_pinpoints": GRID}, "not as spatial"),
        (
            "llama",
            "clip",
            {"aspect_ratio": "anyres", "grid_pinpoints": GRID},
            "one tile an image, not anyres with flat",
        ),
    ],
)
def test_what_transformers_cannot_compute_is_an_error(
    tmp_path: Path, family: str, tower: str, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(FormatError, match=says):
        served(tmp_path, family, tower, **settings)
    assert not any((tmp_path / "out").iterdir())


def test_a_bias_of_the_head_has_no_place(tmp_path: Path) -> None:
    language, tower = language_folder(tmp_path / "l", "phi", head_bias=True), tower_folder(tmp_path / "t", "clip")
    with pytest.raises(FormatError, match="no bias in the head"):
        plan_llava_hf(origin_of(language, tower, settings_of(tower)), export_config(tmp_path / "out"))
