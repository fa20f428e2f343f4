"""export.py --run: from a run's checkpoint and the 16-bit files of its base, whatever bits it was trained beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import export
from engine.architecture import model_of, record
from engine.checkpoint import save_checkpoint
from engine.config import Config
from engine.config_file import to_yaml
from engine.errors import CheckpointError, UsageError
from engine.export.chat_templates import jinja
from engine.sources import open_sources
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.checkpoint import open_checkpoint
from models.weights.errors import WeightsError
from models.weights.identity import identity
from models.weights.lavin import read_lavin_adapters, read_lavin_args
from tests.engine.export.made_up import (
    assert_same_tensors,
    language_folder,
    settings_of,
    tensors_of,
    tower_folder,
)


def configuration(folder: Path, family: str = "llama", tower: str = "clip") -> Config:
    config = Config()
    config.model.language = str(language_folder(folder / "language", family))
    config.model.vision = str(tower_folder(folder / "tower", tower))
    config.model.projector, config.model.select_layer = "mlp2x_gelu", -2
    config.train.language = config.train.vision = "frozen"
    config.dataset.image_aspect_ratio, config.model.cache_weights = "pad", False
    return config


def trained(folder: Path, config: Config) -> tuple[Path, dict[str, Tensor], VLMConfig]:
    """A run directory as training leaves it, with every trained tensor random."""
    sources = open_sources(config)
    record(config, sources)
    shape = model_of(config, sources)
    with torch.device("meta"):
        model = VisionLanguageModel(shape)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(p.shape, generator=generator) for name, p in model.trainable().items()}
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    state = {"base": identity(sources.files), "counters": {"samples": 31}, "samples": 11}
    save_checkpoint(run, 6, tensors, state)
    return run, tensors, shape


def run_export(run: Path, to: str, output: Path, *more: str) -> Path:
    assert export.main(["--run", str(run), "--to", to, "--output", str(output), *more]) == 0
    return output


def within(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(part)}


def test_a_lora_beside_four_bits_is_merged_into_the_base_of_sixteen(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.bits, config.train.language, config.lora.rank, config.lora.alpha = "4bit", "lora", 2, 6.0
    run, tensors, _ = trained(tmp_path, config)
    back = open_checkpoint(run_export(run, "llava", tmp_path / "lora"))
    assert back.kind == "lora" and back.lora is not None and back.lora_config is not None
    assert_same_tensors(
        {f"language.{n}": t for n, t in back.lora.items()}, {n: t for n, t in tensors.items() if ".lora." in n}
    )
    assert (back.lora_config.rank, back.lora_config.alpha) == (2, 6.0)
    assert back.settings == settings_of(tmp_path / "tower", aspect_ratio="pad", max_length=512)

    merged = tensors_of(open_checkpoint(run_export(run, "merged", tmp_path / "merged")))
    base = tensors_of(open_checkpoint(tmp_path / "language"))
    name = "layers.1.mlp.down"
    a, b = (tensors[f"language.{name}.lora.{side}"] for side in "ab")
    expected = base[f"language.{name}.weight"] + 3.0 * (b @ a)
    torch.testing.assert_close(merged[f"language.{name}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["language.embed.weight"], base["language.embed.weight"])
    assert_same_tensors(within(merged, "projector."), within(tensors, "projector."))


def test_a_projector(tmp_path: Path) -> None:
    config = configuration(tmp_path, "stablelm", "siglip")
    run, tensors, _ = trained(tmp_path, config)
    output = run_export(run, "llava", tmp_path / "out")
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "mm_projector.bin"]
    assert_same_tensors(tensors_of(open_checkpoint(output)), tensors)
    said = json.loads((output / "config.json").read_text())
    assert said["model_type"] == "bunny-stablelm" and said["tune_mm_mlp_adapter"] is True


def test_a_run_on_tiles_is_llava_next(tmp_path: Path) -> None:
    """Its grids in LLaVA's order of sides and in transformers', and the image_newline that it trained."""
    config = configuration(tmp_path)
    config.dataset.image_aspect_ratio, config.model.patch_merge = "anyres", "spatial_unpad"
    config.dataset.anyres_grids = "1x2,2x1,3x1"
    run, tensors, _ = trained(tmp_path, config)
    sizes = ((12, 24), (24, 12), (36, 12))
    for to in ("merged", "llava-hf"):
        back = open_checkpoint(run_export(run, to, tmp_path / to))
        assert back.settings is not None and back.settings.grid_pinpoints == sizes
        assert (back.settings.merge, back.settings.aspect_ratio) == ("spatial_unpad", "anyres")
        assert back.image_newline is not None and torch.equal(back.image_newline, tensors["image_newline"])
    said = json.loads((tmp_path / "llava-hf" / "config.json").read_text())
    assert said["model_type"] == "llava_next" and said["image_grid_pinpoints"] == [[24, 12], [12, 24], [12, 36]]


def test_everything_that_was_trained_takes_the_place_of_the_base(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.bits, config.train.language, config.train.vision = "16bit", "full", "full"
    run, tensors, shape = trained(tmp_path, config)
    back = open_checkpoint(run_export(run, "llava", tmp_path / "out", "--vision", "openai/clip"))
    assert back.settings == settings_of(Path("openai/clip"), aspect_ratio="pad", max_length=512, tower_trained=True)
    assert_same_tensors(tensors_of(back), tensors)
    assert back.vision is not None and shape.vision.layers_run == 5
    unused = {name: tensor.clone() for name, tensor in back.vision.unused()}  # the sixth layer is the tower's own
    assert any(".layers.5." in name for name in unused)


def test_a_tower_is_called_as_it_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody named it: by the path that was looked at, a folder or a file, not by where this disk has it."""
    monkeypatch.chdir(tmp_path)
    config = configuration(Path(), "llama", "clip")
    Path("tower").rename("clip-vit-large-patch14")
    config.model.vision = ""
    run, _, _ = trained(Path(), config)
    assert tower_said(run_export(run, "merged", Path("a"))) == "clip-vit-large-patch14"
    file = tower_folder(Path("eva"), "eva")
    monkeypatch.setattr("engine.sources.find_vision", lambda *_: file)
    config = configuration(Path("second"), "llama", "eva")
    config.model.vision = ""
    run, _, _ = trained(Path("second"), config)
    assert tower_said(run_export(run, "merged", Path("b"))) == "eva/eva.pt"


def test_a_tower_is_called_as_where_training_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector's config.json names it; a checkpoint that holds it and names none is its name."""
    monkeypatch.chdir(tmp_path)
    run, _, _ = trained(Path(), configuration(Path()))
    run_export(run, "llava", Path("stage1"))
    whole = run_export(run, "merged", Path("whole"))
    second = Config()
    second.model.language, second.model.projector_weights, second.model.cache_weights = "language", "stage1", False
    second.train.language = second.train.vision = "frozen"
    Path("second").mkdir()
    run, _, _ = trained(Path("second"), second)
    assert tower_said(run_export(run, "merged", Path("a"))) == "tower"

    (whole / "config.json").write_text(
        json.dumps(json.loads((whole / "config.json").read_text()) | {"mm_vision_tower": ""})
    )
    third = Config()
    third.model.language, third.model.cache_weights = "whole", False
    third.train.language = third.train.vision = "frozen"
    Path("third").mkdir()
    run, _, _ = trained(Path("third"), third)
    assert tower_said(run_export(run, "merged", Path("b"))) == "whole"


def tower_said(folder: Path) -> str:
    name: str = json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    return name


@pytest.mark.parametrize("data", ["rows.json", ""])
def test_a_run_is_served_with_the_prompt_that_it_was_trained_with(tmp_path: Path, data: str) -> None:
    """Not with that of other projects' models of this kind."""
    config = configuration(tmp_path)
    config.data = data
    run, _, _ = trained(tmp_path, config)
    own = (run_export(run, "llava-hf", tmp_path / "own") / "chat_template.jinja").read_text()
    assert own == jinja("instruction" if data else "scienceqa", begins=True, spaced=False)
    said = run_export(run, "llava-hf", tmp_path / "said", "--template", "vicuna_v1") / "chat_template.jinja"
    assert said.read_text() == jinja("vicuna_v1", begins=True, spaced=False)


def test_lavins_adapters(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.model.projector, config.train.language, config.model.select_layer = "lavin", "mma", None
    config.adapter.temperature = 7.0
    run, tensors, _ = trained(tmp_path, config)
    output = run_export(run, "lavin", tmp_path / "out")
    file = output / "checkpoint-2.pth"  # 31 samples of 11 are in the third epoch
    assert [path.name for path in output.iterdir()] == [file.name]
    assert_same_tensors(read_lavin_adapters(file, {n: tuple(t.shape) for n, t in tensors.items()}), tensors)
    assert read_lavin_args(file)["temperature"] == 7.0
    for to in ("hf", "llava", "merged", "llava-hf", "peft"):
        with pytest.raises(UsageError, match="MMA adapters") as caught:
            run_export(run, to, tmp_path / to)
        assert "--to lavin" in caught.value.do


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.train.language = "lora"
    run, _, _ = trained(tmp_path, config)
    (tmp_path / "language").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="language model is not at") as caught:
        run_export(run, "peft", tmp_path / "out")
    assert "--base" in caught.value.do
    output = run_export(run, "peft", tmp_path / "out", "--base", str(tmp_path / "moved"))
    said = json.loads((output / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "moved")


def test_another_base_is_not_exported(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.train.language = "lora"
    run, _, _ = trained(tmp_path, config)
    weights = tmp_path / "language" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(WeightsError, match="are not the base weights that the run was trained on"):
        run_export(run, "merged", tmp_path / "out")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run directory"):
        run_export(tmp_path, "merged", tmp_path / "out")
