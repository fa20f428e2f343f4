"""SigLIP from transformers' files: names, values, blocks that were deleted, and settings both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.vision.siglip import SiglipConfig
from models.weights.archive import archive_of
from models.weights.errors import WeightsError
from models.weights.settings import Settings
from models.weights.towers import open_tower_tensors, open_vision, siglip, unused_tensors
from models.weights.view import FileView, Renamed, Tensors

transformers = pytest.importorskip("transformers")

LAYERS = 3
SHAPE = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "image_size": 30, "patch_size": 14,
}  # fmt: skip
CONFIG = SiglipConfig(width=24, num_layers=LAYERS, num_heads=2, patch_size=14, image_size=30, mlp_dim=20)
RENAMES = (
    ("embeddings.patch_embedding", "patch_embed"), ("embeddings.position_embedding.weight", "position_embedding"),
    ("encoder.", ""), ("self_attn.out_proj", "attention.o"), ("self_attn.q_proj", "attention.q"),
    ("self_attn.k_proj", "attention.k"), ("self_attn.v_proj", "attention.v"), ("layer_norm1", "attention_norm"),
    ("layer_norm2", "mlp_norm"), ("mlp.fc1", "mlp.up"), ("mlp.fc2", "mlp.down"),
)  # fmt: skip


def random_tower(kind: str = "SiglipVisionModel") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**SHAPE)
    if kind == "SiglipModel":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        whole = transformers.SiglipConfig(vision_config=config.to_dict(), text_config=text | {"vocab_size": 9})
        model = transformers.SiglipModel(whole)
    else:
        model = transformers.SiglipVisionModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def bare(model: nn.Module) -> dict[str, Tensor]:
    """The tower's tensors under transformers' names without vision_model."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("text", "logit"))}
    return {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}


def ours(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Those that `layers` blocks need, renamed word by word."""
    out = {}
    for name, tensor in tensors.items():
        if name.startswith(("post_layernorm", "head.")) or any(f"layers.{i}." in name for i in range(layers, LAYERS)):
            continue
        for theirs, here in RENAMES:
            name = name.replace(theirs, here)
        out[name] = tensor
    return out


@pytest.mark.parametrize("kind", ["SiglipVisionModel", "SiglipModel"])
def test_a_folder_of_transformers(tmp_path: Path, assert_same: Callable[..., None], kind: str) -> None:
    model = random_tower(kind)
    model.save_pretrained(tmp_path)
    source = open_vision(tmp_path)
    assert source.config == CONFIG
    assert_same(source.stream(), ours(bare(model), LAYERS - 1))
    source = open_vision(tmp_path, select_layer=-1, select_feature="patch")
    assert source.config == replace(CONFIG, select_layer=-1)
    assert_same(source.stream(), ours(bare(model), LAYERS))


def test_what_is_not_run_is_given_to_exports(tmp_path: Path) -> None:
    model = random_tower()
    model.save_pretrained(tmp_path)
    source = open_vision(tmp_path)
    ran = {siglip.EXPORT.of(name): tensor for name, tensor in source.stream()}
    unused = dict(unused_tensors(source))
    assert "vision_model.head.probe" in unused and "vision_model.encoder.layers.2.mlp.fc1.bias" in unused
    whole = {f"vision_model.{name}": tensor for name, tensor in bare(model).items()}
    assert (ran | unused).keys() == whole.keys() and not ran.keys() & unused.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in (ran | unused).items())


def without(folder: Path, *parts: str) -> Path:
    """The folder's file without the tensors whose names hold one of `parts`."""
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not any(part in n for part in parts)}, path)
    return folder


def test_blocks_that_were_deleted_are_not_missed_where_they_are_not_run(
    tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    model = random_tower()
    model.save_pretrained(tmp_path)
    without(tmp_path, "layers.2.", "head.", "post_layernorm")  # as Imp writes it; config.json still says three
    source = open_vision(tmp_path, select_layer=-2)
    assert source.config.num_layers == LAYERS
    assert_same(source.stream(), ours(bare(model), LAYERS - 1))
    assert not list(unused_tensors(source))
    with pytest.raises(WeightsError, match="missing") as caught:
        open_vision(tmp_path, select_layer=-1)
    assert len(caught.value.missing) == 16 and all("layers.2." in name for name in caught.value.missing)


def test_a_block_that_is_there_by_half_is_an_error(tmp_path: Path) -> None:
    random_tower().save_pretrained(tmp_path)
    without(tmp_path, "layers.2.mlp.fc1")
    with pytest.raises(WeightsError) as caught:
        open_vision(tmp_path)
    assert [name.rpartition("layers.")[2] for name in caught.value.missing] == ["2.mlp.fc1.weight", "2.mlp.fc1.bias"]
    assert not caught.value.extra


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "siglip2_vision_model"}, "model_type 'siglip2_vision_model'"),
        ({"num_hidden_layers": 2}, r"extra \(16\)"),
        ({"image_size": 42}, "got 4x24, expected 9x24"),
    ],
)
def test_settings_of_another_tower(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    random_tower().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(WeightsError, match=message):
        open_vision(tmp_path)


def test_class_tokens_of_a_tower_without_one(tmp_path: Path) -> None:
    random_tower().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no class token"):
        open_vision(tmp_path, select_feature="class_tokens")


def test_settings_and_image_processor_as_transformers_reads_them(tmp_path: Path) -> None:
    settings = siglip.settings_of(CONFIG)
    assert siglip.config_of(Settings(tmp_path / "config.json", settings)) == CONFIG
    config = transformers.SiglipVisionConfig.from_dict(settings)
    assert config.to_diff_dict().items() >= SHAPE.items()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(siglip.preprocessor_of(CONFIG)))
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    tiles = images(torch.full((3, 50, 40), 255, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert tiles.shape == (1, 3, 30, 30)
    torch.testing.assert_close(tiles, torch.ones_like(tiles))


def published(blocks: int, tmp_path: Path, width: int = 1152, prefix: str = "vision_model.") -> Tensors:
    """so400m as a file would have it; the tensors take no memory."""
    mlp = 4304
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14), "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (729, width),
    }  # fmt: skip
    for i in range(blocks):
        layer = f"encoder.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{layer}{name}.weight": (width, width), f"{layer}{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
        shapes |= {f"{layer}mlp.fc1.weight": (mlp, width), f"{layer}mlp.fc1.bias": (mlp,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, mlp), f"{layer}mlp.fc2.bias": (width,)}
    tensors = {f"model.vision_tower.{prefix}{n}": torch.empty(s, device="meta") for n, s in shapes.items()}
    file = FileView(lambda: archive_of(tmp_path / "model.safetensors", tensors))
    return Renamed(file, {name.removeprefix("model.vision_tower."): name for name in tensors})


@pytest.mark.parametrize("blocks", [26, 27])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_checkpoint_that_does_not_describe_its_tower_has_a_published_one(
    tmp_path: Path, blocks: int, prefix: str
) -> None:
    """Neither heads nor deleted blocks nor the pixels beyond the last patch are in a shape."""
    source = open_tower_tensors(tmp_path, published(blocks, tmp_path, prefix=prefix), None, select_layer=-2)
    assert source.config == SiglipConfig()
    assert len(source.names) == 3 + 26 * 16


def test_a_tower_that_is_not_published_needs_its_settings(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none of the published ones: .*4304x1024"):
        open_tower_tensors(tmp_path, published(1, tmp_path, width=1024), None)
    with pytest.raises(WeightsError, match="has 28 blocks; a tower of width 1152 has 27"):
        open_tower_tensors(tmp_path, published(28, tmp_path), None)
