"""What was exported is trained on, planned for and talked to: a LoRA through --adapter.init, a whole model by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import chat as chat_command
import export
import train as train_command
from engine.checkpoint import find_latest, load_checkpoint
from engine.config_file import from_yaml
from engine.flags import parse_train
from engine.plan.shapes import shapes
from engine.trained import open_trained
from tests.engine.tiny_folders import make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA and projector on Phi and SigLIP in run/, exported to peft/, llava/ and merged/."""
    root = make_home(tmp_path_factory.mktemp("home"))
    train(root, "run", "phi", "--model.vision", str(root / "siglip"), "--lora.rank", "3", "--lora.alpha", "7")
    for to in ("peft", "llava", "merged"):
        assert export.main(["--run", str(root / "run"), "--to", to, "--output", str(root / to)]) == 0
    return root


def flags(root: Path, run: str, language: str, *more: str) -> list[str]:
    return [
        "--data", str(root / "rows.json"), "--image_folder", str(root), "--model.language", str(root / language),
        "--train.language", "lora", "--optim.batch_size", "4", "--optim.epochs", "1", "--optim.lr", "0.05",
        "--optim.warmup_epochs", "0", "--bits", "16bit", "--dataset.max_seq_len", "160", "--output_dir",
        str(root / run), "--model.no_cache_weights", "--runtime.device", "cpu", *more,
    ]  # fmt: skip


def train(root: Path, run: str, language: str, *more: str) -> dict[str, Tensor]:
    assert train_command.main(flags(root, run, language, *more)) == 0
    return tensors_of(root / run)


def tensors_of(run: Path) -> dict[str, Tensor]:
    step = find_latest(run)
    assert step is not None
    return load_checkpoint(step, only=["model"])[0]


def answer(run: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    asked = ["--run", str(run), "--image", str(root / "red.png"), "--question", "What is shown?"]
    assert chat_command.main([*asked, "--max_new_tokens", "8", "--temperature", "0", "--runtime.device", "cpu"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("to", ["peft", "llava"])
def test_a_lora_is_trained_on(home: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank and alpha, the LoRA and the projector are those of the run; a step of nearly nothing keeps them."""
    more = ("--model.vision", str(home / "siglip"), "--adapter.init", str(home / to), "--optim.lr", "1e-30")
    again, first = train(home, f"from-{to}", "phi", *more), tensors_of(home / "run")
    assert sorted(again) == sorted(first) and any(".lora." in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
    assert from_yaml(home / f"from-{to}" / "config.yaml").lora.alpha == 7
    assert answer(home / f"from-{to}", home, capsys) == answer(home / "run", home, capsys)


def test_a_merged_model_is_planned_trained_and_talked_to(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named as the language model it brings its tower and its projector; its answers are the run's."""
    argv = flags(home, "from-merged", "merged", "--lora.rank", "2", "--optim.lr", "1e-30")
    planned = shapes(parse_train(argv)[0]).model
    assert train_command.main([*argv, "--plan"]) == 0
    assert "memory" in capsys.readouterr().out
    assert train_command.main(argv) == 0
    opened = open_trained(from_yaml(home / "from-merged" / "config.yaml"), home / "from-merged").model
    assert opened.config == planned
    for name, tensor in tensors_of(home / "run").items():
        if name.startswith("projector."):
            assert torch.equal(opened.get_parameter(name), tensor), name
    original = open_trained(from_yaml(home / "run" / "config.yaml"), home / "run").model
    linear = "language.layers.1.attention.q"
    a, b = (original.get_parameter(f"{linear}.lora.{side}") for side in "ab")
    expected = original.get_parameter(f"{linear}.weight") + 7 / 3 * (b @ a)
    torch.testing.assert_close(opened.get_parameter(f"{linear}.weight"), expected, rtol=1e-5, atol=1e-6)
    assert (7 / 3 * (b @ a)).abs().max() > 1e-3  # there was something to merge
    assert answer(home / "from-merged", home, capsys) == answer(home / "run", home, capsys)
