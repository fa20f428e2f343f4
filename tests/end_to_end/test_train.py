"""train.py from flags to files, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import trainer
from engine.checkpoint import find_latest, load_checkpoint
from engine.signals import StopSignals
from models.weights.lavin import read_lavin_args
from tests.end_to_end.conftest import Train, World
from tests.engine.tiny_folders import make_home

REPOSITORY = Path(__file__).parents[2]
SHORT = ["--optim.batch_size", "8", "--optim.epochs", "2", "--optim.warmup_epochs", "0.5", "--optim.lr", "0.02"]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    step = find_latest(run)
    assert step is not None
    return load_checkpoint(step)[0]


@pytest.mark.parametrize("bits", ["16bit", "8bit", "4bit"])
def test_each_width_learns_and_writes_its_run(
    world: World, type_train: Train, tmp_path: Path, bits: str
) -> None:  # fmt: skip
    flags = [*world.scienceqa, *SHORT, "--bits", bits, "--optim.epochs", "8", "--log.evaluate", "both"]
    assert type_train(*flags) == 0
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    final = json.loads((run / "metrics_final.json").read_text())
    assert final["steps"] == 24 and final["trainable_parameters"] > 0 and 0 < final["packing_efficiency"] <= 1
    assert set(final["accuracy"]) == set(final["accuracy_before"])
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    for name in ("config.yaml", "command.txt", "env.json", "metrics.csv", "loss.svg", "log.txt", "REPORT.md", "latest"):
        assert (run / name).stat().st_size > 0, name


class StopAt(StopSignals):
    """Behaves as if a signal came during the given step."""

    step = 0

    def __enter__(self) -> StopAt:
        self.asked = 0
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked == self.step


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_stopping_at_any_step_and_resuming_is_the_same_run(
    world: World, type_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    flags = [*world.scienceqa, *SHORT]  # 3 steps an epoch, 6 in all
    assert type_train(*flags, name="whole") == 0
    monkeypatch.setattr("engine.run.StopSignals", type("Stop", (StopAt,), {"step": stop_after}))
    assert type_train(*flags, name="parts") == 75
    assert json.loads((tmp_path / "parts" / "exit.json").read_text())["stopped"] is True
    monkeypatch.undo()
    assert type_train(*flags, "--resume", "auto", name="parts") == 0
    whole, parts = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    different = [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert not different


def lavin_flags(world: World, folder: Path) -> list[str]:
    packing = ["--runtime.tokens_per_batch", "256", "--optim.reduction", "micro_batch"]
    return [*world.scienceqa, "--adapter.dropout", "0", *packing]


def lora_flags(world: World, folder: Path) -> list[str]:
    """LoRA on Phi with SigLIP, pictures in tiles with an image_newline: a rank's last pack has text only."""
    folder.mkdir()
    home = make_home(folder)
    settings = json.loads((home / "phi" / "config.json").read_text())
    (home / "phi" / "config.json").write_text(json.dumps(settings | {"resid_pdrop": 0.0}))
    return [
        "--data", str(home / "rows.json"), "--image_folder", str(home), "--model.language", str(home / "phi"),
        "--model.vision", str(home / "siglip"), "--train.language", "lora", "--lora.rank", "4", "--lora.dropout", "0",
        "--dataset.image_aspect_ratio", "anyres", "--model.patch_merge", "spatial_unpad",
        "--dataset.max_seq_len", "200", "--runtime.tokens_per_batch", "128",
    ]  # fmt: skip


@pytest.mark.parametrize("flags_of", [lavin_flags, lora_flags])
def test_two_ranks_are_one_rank(
    world: World, tmp_path: Path, type_train: Train, flags_of: Callable[[World, Path], list[str]]
) -> None:
    """The same samples a step, without dropout (its mask belongs to the pack): the same weights. A rank has several
    packs, whose gradients add up before they are exchanged."""
    flags = [*flags_of(world, tmp_path / "home"), *SHORT, "--optim.batch_size", "4"]
    assert type_train(*flags, "--optim.accum_iter", "2", name="ranks-1") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*flags, "--output_dir", str(tmp_path / "ranks-2")]
    done = subprocess.run([*command, str(REPOSITORY / "train.py"), *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = last_weights(tmp_path / "ranks-1"), last_weights(tmp_path / "ranks-2")
    for name in one:
        if not name.startswith("optimizer"):
            scale = one[name].abs().max().clamp(min=1e-3)
            assert ((one[name] - two[name]).abs().max() / scale) < 1e-3, name


def test_your_own_rows_with_validation_keep_the_best_step(world: World, type_train: Train, tmp_path: Path) -> None:
    flags = [*world.base, "--data", world.rows, "--image_folder", world.rows.parent, "--eval_data", world.rows]
    assert type_train(*flags, "--eval_every", 2, "--optim.batch_size", 4, "--optim.epochs", 4, "--optim.lr", 0.01) == 0
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=lambda step: losses[step])
    assert (run / "best").read_text().strip() == f"step-{best}" and (run / f"step-{best}").is_dir()


def test_a_step_is_saved_once_though_it_is_the_best_and_ends_an_epoch(
    world: World, type_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = trainer.save_checkpoint

    def save(run: Path, step: int, *arguments: Any, **options: Any) -> Path:
        saved.append(step)
        return real(run, step, *arguments, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    flags = [*world.base, "--data", world.rows, "--image_folder", world.rows.parent, "--eval_data", world.rows]
    assert type_train(*flags, "--eval_every", 1, "--optim.batch_size", 4, "--optim.epochs", 2, "--optim.lr", 0.01) == 0
    assert saved[-1] == 6 and 3 in saved and len(set(saved)) == len(saved)


def test_lavin_checkpoints_stand_where_its_next_command_reads_them(
    world: World, type_train: Train, tmp_path: Path
) -> None:
    assert type_train(*world.scienceqa, *SHORT, "--log.lavin_checkpoints") == 0
    saved = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)
    assert saved["epoch"] == 1 and not (tmp_path / "run" / "checkpoint-2.pth").exists()
    assert "module.layers.0.adapter_attn.conv_A.weight" in saved["model"]
    assert saved["model"]["module.layers.0.adapter_attn.conv_A.weight"].shape == (8, 32, 1)
    assert read_lavin_args(tmp_path / "run" / "checkpoint-1.pth")["temperature"] == 10.0


def test_fp16_loses_no_step(world: World, type_train: Train, tmp_path: Path) -> None:
    """An overflow repeats its step with a smaller scale: as many updates as steps, the first included."""
    assert type_train(*world.scienceqa, *SHORT, "--runtime.precision", "fp16", "--bits", "16bit") == 0
    tensors = last_weights(tmp_path / "run")
    steps = [float(tensor) for name, tensor in tensors.items() if name.startswith("optimizer/step/")]
    assert steps and set(steps) == {6.0}


def test_a_dry_run_keeps_nothing(world: World, type_train: Train, tmp_path: Path) -> None:
    assert type_train(*world.scienceqa, *SHORT, "--dry_run") == 0
    assert list(tmp_path.iterdir()) == []


def test_cut_samples_are_counted(
    world: World, type_train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert type_train(*world.scienceqa, *SHORT, "--dataset.max_seq_len", "90") == 0
    told = "24 of 24 samples were cut at the end to fit --dataset.max_seq_len; 0 of them have no target left"
    assert told in capfd.readouterr().err
    assert told in (tmp_path / "run" / "log.txt").read_text() and told in (tmp_path / "run" / "REPORT.md").read_text()
