"""What only Bunny has, from its checkpoint through a run to its format again: S2 and its own projectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import export
from engine.architecture import record
from engine.chat import chat
from engine.checkpoint import find_latest, load_checkpoint
from engine.config_file import from_yaml
from engine.errors import UsageError
from engine.flags import parse_chat, parse_train
from engine.pictures import processor
from engine.plan.shapes import shapes
from engine.run import train
from engine.sources import open_sources
from engine.trained import open_trained
from models.projector import ProjectorConfig, make_projector
from models.weights.checkpoint import open_checkpoint
from models.weights.errors import WeightsError
from models.weights.projector_names import their_projector_name
from tests.engine.tiny_folders import DIM, SIDE, WIDTH, write_language, write_tower
from tests.world import make_rows

CASES = [("sppv2", (SIDE, 3 * SIDE), 1), ("ldp", (), 4)]


def bunny(root: Path, kind: str, scales: tuple[int, ...]) -> dict[str, Tensor]:
    """A Bunny of StableLM and SigLIP in root/bunny, with rows. Returns its projector under our names."""
    folder = write_language(root / "bunny", "stablelm")
    write_tower(root / "siglip", "siglip")
    make_rows(root, 8)
    said = json.loads((folder / "config.json").read_text()) | {
        "model_type": "bunny-stablelm", "mm_vision_tower": str(root / "siglip"), "mm_projector_type": kind,
        "mm_hidden_size": WIDTH * max(1, len(scales)), "use_s2": bool(scales),
    }  # fmt: skip
    if scales:
        said["s2_scales"] = ",".join(map(str, reversed(scales)))  # Bunny sorts them
    (folder / "config.json").write_text(json.dumps(said))
    torch.manual_seed(0)
    module = make_projector(ProjectorConfig(kind=kind), said["mm_hidden_size"], DIM)
    projector = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {f"model.mm_projector.{their_projector_name(name, kind)}": t for name, t in projector.items()}
    save_file(load_file(folder / "model.safetensors") | theirs, folder / "model.safetensors", {"format": "pt"})
    return projector


def flags_of(root: Path, *more: str) -> list[str]:
    return [
        "--data", str(root / "rows.json"), "--image_folder", str(root), "--model.language", str(root / "bunny"),
        "--train.language", "lora", "--lora.rank", "2", "--optim.batch_size", "4", "--optim.epochs", "1",
        "--optim.lr", "1e-30", "--optim.warmup_epochs", "0", "--bits", "16bit", "--dataset.max_seq_len", "160",
        "--output_dir", str(root / "run"), "--model.no_cache_weights", *more,
    ]  # fmt: skip


def run_of(root: Path) -> dict[str, Tensor]:
    argv = flags_of(root)
    config, notes = parse_train(argv)
    assert train(config, argv, notes, max_steps=1) == 0
    step = find_latest(root / "run")
    assert step is not None
    return load_checkpoint(step, only=["model"])[0]


@pytest.mark.parametrize(("kind", "scales", "tokens"), CASES)
def test_a_checkpoint_through_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, scales: tuple[int, ...], tokens: int
) -> None:
    projector = bunny(tmp_path, kind, scales)
    planned = shapes(parse_train(flags_of(tmp_path))[0]).model
    tensors = run_of(tmp_path)
    config = from_yaml(tmp_path / "run" / "config.yaml")
    assert config.model.projector == kind and config.model.s2 == (",".join(map(str, scales)) or "auto")
    opened = open_trained(config, tmp_path / "run").model
    assert opened.config == planned and opened.config.tokens_per_tile == tokens
    assert opened.config.vision.scales == scales and processor(config, opened.config).size == max((SIDE, *scales))
    for name, tensor in projector.items():
        assert torch.equal(opened.get_parameter(f"projector.{name}"), tensor), name
        assert torch.equal(tensors[f"projector.{name}"], tensor), name

    capsys.readouterr()
    asked = ["--run", str(tmp_path / "run"), "--image", str(tmp_path / "red.png"), "--question", "What is shown?"]
    assert chat(parse_chat([*asked, "--max_new_tokens", "2", "--temperature", "0"])) == 0

    out = tmp_path / "out"
    assert export.main(["--run", str(tmp_path / "run"), "--to", "merged", "--output", str(out)]) == 0
    said: dict[str, Any] = json.loads((out / "config.json").read_text())
    assert (said["model_type"], said["use_s2"], said["mm_projector_type"]) == ("bunny-stablelm", bool(scales), kind)
    assert said["mm_hidden_size"] == WIDTH * max(1, len(scales))
    assert said.get("s2_scales", "") == ",".join(map(str, scales))
    back = open_checkpoint(out)
    assert back.projector is not None and back.projector.keys() == projector.keys()
    assert all(torch.equal(back.projector[name], tensor) for name, tensor in projector.items())
    assert back.settings is not None and (back.settings.projector, back.settings.scales) == (kind, scales)
    with pytest.raises(UsageError, match=r"projector mlp2x_gelu, not|one size"):
        export.main(["--run", str(tmp_path / "run"), "--to", "llava-hf", "--output", str(tmp_path / "hf"), "--debug"])


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (("--model.s2", "12,30"), UsageError, "rising multiples of 12"),
        (("--model.s2", "big"), UsageError, "give auto, none, or sizes"),
        (("--model.s2", "none"), WeightsError, "got 32x48, expected 32x24"),
        (("--model.s2", "none", "--model.projector_weights", ""), WeightsError, "tower's 24 channels"),
        (("--dataset.image_aspect_ratio", "anyres"), UsageError, "tiles of anyres for a tower that sees"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, more: tuple[str, ...], error: type[Exception], message: str) -> None:
    bunny(tmp_path, "mlp2x_gelu", (SIDE, 2 * SIDE))
    config, _ = parse_train(flags_of(tmp_path, *more))
    with pytest.raises(error, match=message):
        processor(config, record(config, open_sources(config)))
