from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.vision.clip import ClipConfig
from models.weights.errors import WeightsError
from models.weights.settings import Settings
from models.weights.towers import clip, find_vision, open_vision, unused_tensors

transformers = pytest.importorskip("transformers")

Tensors = dict[str, Tensor]
WIDTH, LAYERS = 128, 6
CONFIG = ClipConfig(width=WIDTH, num_layers=LAYERS, num_heads=2, patch_size=14, image_size=28, mlp_dim=96)
TOWER = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def hf_tower() -> nn.Module:
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    for parameter in tower.parameters():  # norms and biases start as ones and zeros, which would hide a mix-up
        nn.init.normal_(parameter)
    return tower


def openai_tensors(tower: nn.Module) -> Tensors:
    """The tower under OpenAI's names, beside a text model's."""
    state = {name.removeprefix("vision_model."): t.detach().clone() for name, t in tower.state_dict().items()}
    out = {
        "visual.conv1.weight": state["embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["embeddings.class_embedding"],
        "visual.positional_embedding": state["embeddings.position_embedding.weight"],
        "visual.proj": torch.ones(WIDTH, 8), "token_embedding.weight": torch.ones(5, 8), "ln_final.bias": torch.ones(8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(8), "positional_embedding": torch.ones(3, 8),
        "text_projection": torch.ones(8, 8), "logit_scale": torch.ones(()), "input_resolution": torch.tensor(28),
        "context_length": torch.tensor(77), "vocab_size": torch.tensor(5),
    }  # fmt: skip
    for leaf in ("weight", "bias"):
        out[f"visual.ln_pre.{leaf}"] = state[f"pre_layrnorm.{leaf}"]
        out[f"visual.ln_post.{leaf}"] = state[f"post_layernorm.{leaf}"]
        for i in range(LAYERS):
            theirs, block = f"encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
            parts = [state[f"{theirs}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"{block}.attn.in_proj_{leaf}"] = torch.cat(parts)
            out[f"{block}.attn.out_proj.{leaf}"] = state[f"{theirs}.self_attn.out_proj.{leaf}"]
            for here, there in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1")):
                out[f"{block}.{here}.{leaf}"] = state[f"{theirs}.{there}.{leaf}"]
            out[f"{block}.mlp.c_proj.{leaf}"] = state[f"{theirs}.mlp.fc2.{leaf}"]
    return out


def expected_tensors(tower: nn.Module) -> Tensors:
    state = {name.removeprefix("vision_model."): t for name, t in tower.state_dict().items()}
    renames = (
        ("encoder.", ""), ("self_attn.out_proj", "attention.o"), ("self_attn.q_proj", "attention.q"),
        ("self_attn.k_proj", "attention.k"), ("self_attn.v_proj", "attention.v"), ("layer_norm1", "attention_norm"),
        ("layer_norm2", "mlp_norm"), ("mlp.fc1", "mlp.up"), ("mlp.fc2", "mlp.down"), ("pre_layrnorm", "pre_norm"),
        ("embeddings.patch_embedding", "patch_embed"), ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "position_embedding"),
    )  # fmt: skip
    out = {}
    for name, tensor in state.items():
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        if not name.startswith("post_layernorm") and not name.endswith("position_ids"):
            out[name] = tensor
    return out


def test_a_folder_of_a_vision_model(tmp_path: Path, assert_same: Callable[..., None]) -> None:
    tower = hf_tower()
    tower.save_pretrained(tmp_path)
    source = open_vision(tmp_path)
    assert source.config == CONFIG
    assert_same(source.stream(), expected_tensors(tower))
    assert_same(open_vision(tmp_path / "model.safetensors").stream(), expected_tensors(tower))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_a_whole_clip(tmp_path: Path, assert_same: Callable[..., None], file: str) -> None:
    tower = hf_tower()
    config = transformers.CLIPConfig(
        vision_config=TOWER, text_config={"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 50000}
    )
    model = transformers.CLIPModel(config)
    model.vision_model.load_state_dict({n.removeprefix("vision_model."): t for n, t in tower.state_dict().items()})
    model.save_pretrained(tmp_path)
    if file.endswith(".bin"):  # as older versions wrote it, with a table of positions
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / file)
    source = open_vision(tmp_path)
    assert source.config == CONFIG
    assert [path.name for path in source.files] == ["config.json", file]
    assert_same(source.stream(), expected_tensors(tower))


@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_a_file_with_openais_names_gives_the_same_stream(
    tmp_path: Path, assert_same: Callable[..., None], name: str
) -> None:
    tower = hf_tower()
    save = save_file if name.endswith("safetensors") else torch.save
    save(openai_tensors(tower), tmp_path / name)
    source = open_vision(tmp_path / name)
    assert source.config == CONFIG
    assert_same(source.stream(), expected_tensors(tower))


@pytest.mark.parametrize("kind", ["hf", "openai"])
def test_the_patches_of_a_layer_leave_the_rest_to_exports(
    tmp_path: Path, assert_same: Callable[..., None], kind: str
) -> None:
    tower = hf_tower()
    if kind == "hf":
        tower.save_pretrained(tmp_path)
    else:
        torch.save(openai_tensors(tower), tmp_path / "clip.pt")
    source = open_vision(tmp_path, select_layer=-2)
    assert source.config == replace(CONFIG, select_layer=-2, select_feature="patch")
    last = f"layers.{LAYERS - 1}."
    assert_same(source.stream(), {n: t for n, t in expected_tensors(tower).items() if not n.startswith(last)})
    out = {clip.EXPORT.of(name): tensor for name, tensor in source.stream()} | dict(unused_tensors(source))
    state = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in tower.state_dict().items()}
    assert out.keys() == {name for name in state if not name.endswith("position_ids")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in out.items())


def test_settings_and_image_processor_as_transformers_reads_them(tmp_path: Path) -> None:
    settings = clip.settings_of(CONFIG)
    assert clip.config_of(Settings(tmp_path / "config.json", settings)) == CONFIG
    assert transformers.CLIPVisionConfig.from_dict(settings).to_diff_dict().items() >= TOWER.items()
    assert settings["hidden_act"] == "quick_gelu"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip.preprocessor_of(CONFIG)))
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    tiles = images(torch.full((3, 50, 40), 255, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    white = [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(tiles, torch.tensor(white)[None, :, None, None].expand(1, 3, 28, 28))


class Program:
    """What a hostile pickle holds: unpickling it would call os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_files_that_are_damaged_or_want_more_than_tensors(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": openai_tensors(hf_tower()), "hook": Program()}, path)
    with pytest.raises(WeightsError, match=r"wants to import .*system"):
        open_vision(path)
    torch.save(openai_tensors(hf_tower()), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged or was not copied to its end"):
        open_vision(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(WeightsError, match="holds a list; expected a dict"):
        open_vision(path)


class Tree(nn.Module):
    """Modules and parameters from dotted names, so that a program with OpenAI's names can be scripted."""

    def add(self, name: str, tensor: Tensor) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            self.register_buffer(first, tensor)
            return
        if first not in dict(self.named_children()):
            self.add_module(first, Tree())
        child = self.get_submodule(first)
        assert isinstance(child, Tree)
        child.add(rest, tensor)


def write_program(path: Path, tensors: Tensors) -> None:
    tree = Tree()
    for name, tensor in tensors.items():
        tree.add(name, tensor)
    torch.jit.save(torch.jit.script(tree), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_program_is_opened_only_if_it_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Callable[..., None]
) -> None:
    import hashlib

    tower = hf_tower()
    path = tmp_path / "ViT-L-14.pt"
    write_program(path, openai_tensors(tower))
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("a foreign program was opened"))
    both = "b8cca3fd41ae0c99.* and ViT-L-14-336px.pt .3035c92b35095992"
    with pytest.raises(WeightsError, match=f"TorchScript program with sha256 .*{both}"):
        open_vision(path)
    monkeypatch.undo()
    monkeypatch.setitem(clip.OPENAI_SHA256, hashlib.sha256(path.read_bytes()).hexdigest(), path.name)
    assert_same(open_vision(path).stream(), expected_tensors(tower))
    assert_same(open_vision(tmp_path).stream(), expected_tensors(tower))  # its folder
    loads: list[Any] = []
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    source = open_vision(path)
    source.fetch("class_embedding")
    assert len(loads) == 2  # for its names, and again for its tensors: not in memory in between
    source.close()


@pytest.mark.parametrize("kind", ["openai", "hf"])
def test_every_difference_is_listed(tmp_path: Path, kind: str) -> None:
    tower = hf_tower()
    tower.save_pretrained(tmp_path)
    if kind == "openai":
        path, tensors, prefix = tmp_path / "clip.safetensors", openai_tensors(tower), "visual."
    else:
        path = tmp_path / "model.safetensors"
        tensors, prefix = load_file(path), "" if "pre_layrnorm.bias" in load_file(path) else "vision_model."
    norm = "ln_pre" if kind == "openai" else "pre_layrnorm"
    del tensors[f"{prefix}{norm}.bias"]
    tensors[f"{prefix}{norm}.weight"] = torch.ones(3)
    tensors[f"{prefix}attnpool.weight"] = torch.ones(3)
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        open_vision(path)
    assert caught.value.missing == [f"{prefix}{norm}.bias"]
    assert caught.value.extra == [f"{prefix}attnpool.weight"]
    assert caught.value.mismatched == [f"{prefix}{norm}.weight: got 3, expected {WIDTH}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "siglip"}, "model_type 'siglip'"),
        ({"num_attention_heads": 3}, "width 128 cannot have 3 heads"),
        ({"num_hidden_layers": 2}, "a tower of 2 blocks"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": 56}, "patches of 56 pixels"),
    ],
)
def test_settings_of_another_tower_name_the_key(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    hf_tower().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(WeightsError, match=message):
        open_vision(tmp_path)


def test_a_resnet_is_not_a_tower(tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "RN50.pt")
    with pytest.raises(WeightsError, match="ResNet") as caught:
        open_vision(tmp_path / "RN50.pt")
    assert "visual.positional_embedding" in caught.value.missing


def test_files_that_are_no_clip(tmp_path: Path) -> None:
    for name in ("v.pt", "w.pt"):
        torch.save({"weight": torch.ones(2)}, tmp_path / name)
    for path, message in (
        (tmp_path / "w.pt", "no tensors of a vision tower"),
        (tmp_path, "2 files of weights and no config.json"),
    ):
        with pytest.raises(WeightsError, match=message):
            open_vision(path)
    with pytest.raises(WeightsError, match="No such file"):
        open_vision(tmp_path / "none.pt")


def test_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    root = tmp_path / "weights"
    assert find_vision(root) is None
    hub = tmp_path / ".cache/huggingface/hub/models--openai--clip-vit-large-patch14/snapshots/0123"
    places = (hub, tmp_path / ".cache/clip/ViT-L-14.pt", root / "clip-vit-large-patch14", root / "ViT-L-14.pt")
    for place in places:  # from the last to the first
        if place.suffix:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        else:
            place.mkdir(parents=True)
            assert find_vision(root) != place  # an empty folder is not a model
            (place / "config.json").touch()
        assert find_vision(root) == place
