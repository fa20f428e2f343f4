"""Out of memory in a step: exit 5, what to do about it, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import run as runs
from engine import trainer
from engine.checkpoint import find_latest
from engine.distributed import Ranks
from engine.errors import OutOfMemory, run_command
from engine.flags import parse_train
from engine.plan.cards import CARDS
from engine.plan.memory_budget import CONTEXT_BYTES
from engine.plan.out_of_memory import Attempt, explained, present_card
from engine.plan.remedies import savers
from engine.plan.verdict import Planner
from engine.rundir import RunDir
from models.language.llama import LLAMA_7B
from models.recompute import ActivationPolicy
from models.vision.clip import ClipConfig
from models.vlm import VLMConfig
from tests.world import make_rows

ROOT, GIB = Path(__file__).parents[3], 2**30

FAILS_AT, STEPS = 3, 4
MIXED = ActivationPolicy(
    language=("keep_input", "recompute_mlp", "save_all", "save_all"), vision=("save_all",) * 3 + ("keep_input",) * 3
)


def demo_line(folder: Path) -> list[str]:
    return ["--output_dir", str(folder / "run"), "--log.evaluate", "none", "--runtime.device", "cpu",
            "--dataset.num_workers", "0"]  # fmt: skip


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def short_run(line: list[str]) -> int:
    config, notes = parse_train(line)
    return runs.train(config, ["train.py", *line], notes, max_steps=STEPS)


def test_a_run_that_runs_out_of_memory_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = ["--output_dir", str(run), "--log.save_every", "2", "--log.evaluate", "none", "--runtime.device", "cpu",
            "--dataset.num_workers", "0"]  # fmt: skip
    step = trainer.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == FAILS_AT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", failing)
    assert run_command(short_run, line) == 5
    said = capsys.readouterr().err
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 5 and "Tried to allocate 2.00 GiB" in ended["reason"]
    assert "were planned" in said and "language layers" in said and "activations, language" in said
    assert f"saved: {run / 'step-2'}" in said and "--resume auto and " in said
    assert " or --" in said.partition("do:")[2], "two things to try"
    assert "Traceback" not in said

    latest = find_latest(run)
    assert latest is not None and latest.name == "step-2", "whole"
    monkeypatch.setattr(trainer, "train_step", step)
    flags = said.partition("do: the same command with --resume auto and ")[2].strip().split(", or ")
    assert len(flags) == 2 and not any("--bits" in flag for flag in flags), "a checkpoint holds for its bits"
    for number, flag in enumerate(flags):  # each is accepted on the way on
        copied = tmp_path / f"run{number}"
        shutil.copytree(run, copied)
        assert run_command(short_run, [*line, "--output_dir", str(copied), "--resume", "auto", *flag.split()]) == 0
        assert json.loads((copied / "exit.json").read_text())["code"] == 0


def test_the_table_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle = runs.settle_memory

    def mixed(setup: Any, *rest: Any) -> int:
        settle(setup, *rest)
        setup.model.use_activation_policy(MIXED)
        return 0

    monkeypatch.setattr(runs, "settle_memory", mixed)
    monkeypatch.setattr(trainer, "train_step", out_of_memory)
    assert run_command(short_run, demo_line(tmp_path)) == 5
    assert f"were planned ({MIXED.describe()})" in capsys.readouterr().err


def test_while_loading_only_weights_can_take_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "build_model", out_of_memory)
    assert run_command(short_run, [*demo_line(tmp_path), "--bits", "16bit"]) == 5
    said = capsys.readouterr().err
    assert "while the model was loaded" in said
    remedies = said.partition("do: the same command with ")[2].strip().split(", or ")
    assert len(remedies) == 2 and all(flag.startswith("--bits") for flag in remedies)


@pytest.mark.parametrize("where", ["scoring", "validation"])
def test_while_scoring_nothing_is_kept_that_could_be_recomputed(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = demo_line(tmp_path)
    if where == "scoring":
        line += ["--log.evaluate", "after"]
        monkeypatch.setattr("engine.setup.predict", out_of_memory)
    else:
        rows = make_rows(tmp_path)
        line += ["--data", str(rows), "--image_folder", str(tmp_path), "--eval_data", str(rows), "--eval_every", "1"]
        monkeypatch.setattr(runs, "validation_loss", out_of_memory)
        line += ["--optim.batch_size", "2"]
    assert run_command(short_run, line) == 5
    said = capsys.readouterr().err
    assert "while the model was evaluated" in said and "--gradient_checkpointing" not in said
    assert "--runtime.tokens_per_batch 1024" in said.partition("do:")[2]


def test_where_nothing_helps_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "train_step", out_of_memory)
    line = [*demo_line(tmp_path), "--gradient_checkpointing", "--runtime.tokens_per_batch", "512", "--bits_vision",
            "4bit", "--bits_head", "4bit"]  # fmt: skip
    assert run_command(short_run, line) == 5
    assert "do: no flag takes clearly less: a machine with more memory" in capsys.readouterr().err


def test_the_hosts_memory_is_not_the_gpus(tmp_path: Path) -> None:
    config, _ = parse_train(demo_line(tmp_path))
    rundir = RunDir(tmp_path / "run")
    attempt = Attempt(config, torch.device("cuda", 0), rundir, Ranks(rank=1, local_rank=1, world=2))
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        with pytest.raises(OutOfMemory) as caught, explained(attempt):
            raise error
        assert caught.value.where.startswith("the host, rank 1 of 2; nothing is saved")
        assert "not that of the GPU" in caught.value.why and "num_workers" in caught.value.do
    with pytest.raises(OSError, match="elsewhere"), explained(attempt):
        raise OSError(errno.EIO, "elsewhere")


def test_nothing_saved_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(trainer, "train_step", failing)
    line = ["--output_dir", str(tmp_path / "run"), "--log.evaluate", "none", "--runtime.device", "cpu"]
    assert run_command(short_run, line) == 5
    said = capsys.readouterr().err
    assert "out of memory" in said and "nothing is saved" in said and "--resume" not in said
    assert "do: the same command with --gradient_checkpointing, or --runtime" in said


def fake_gpu(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int, reserved: int, name: str) -> None:
    found = {
        "get_device_name": name, "get_device_capability": (8, 6), "mem_get_info": (free, total),
        "memory_allocated": reserved // 2, "memory_reserved": reserved, "max_memory_allocated": reserved,
    }  # fmt: skip
    for function, value in found.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)


def test_what_others_hold_of_a_gpu_is_neither_planned_with_nor_concealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, total=24 * GIB, free=GIB, reserved=4 * GIB, name="NVIDIA GeForce RTX 3090")
    card = present_card(torch.device("cuda", 0))
    assert card is not None and card.name == "NVIDIA GeForce RTX 3090" and card.rate == CARDS[0].rate
    assert card.memory == 5 * GIB + CONTEXT_BYTES, "what is free, and what this process has"
    config, _ = parse_train(["--output_dir", str(tmp_path / "run")])
    attempt = Attempt(config, torch.device("cuda", 0), RunDir(tmp_path / "run"), Ranks(rank=0, local_rank=0, world=1))
    with pytest.raises(OutOfMemory) as caught, explained(attempt):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "other processes hold 18.50 GiB of the GPU" in caught.value.why
    assert "2.00 GiB in tensors (4.00 GiB at most)" in caught.value.why

    fake_gpu(monkeypatch, total=15 * GIB, free=15 * GIB, reserved=0, name="NVIDIA RTX A4000")
    unknown = present_card(torch.device("cuda", 0))
    assert unknown is not None and unknown.name == "NVIDIA RTX A4000 (taken to be as fast as RTX 3090)"


def test_copies_go_before_layers_recompute() -> None:
    config, _ = parse_train(["--recipe", str(ROOT / "recipes/lavin-7b-lite.yaml")])
    shapes = VLMConfig(language=LLAMA_7B, vision=ClipConfig())
    planner = Planner(shapes, num_ranks=1, dtype=torch.bfloat16, on_cuda=True)
    card, made = CARDS[0], planner.choice(config, CARDS[0])
    assert planner.on(config, card, made).copied_layers > 0
    flags = list(savers(planner, config, card, made, "training", same_bits=True))
    assert flags[0] == ("--runtime.unpacked_memory", "0") and flags[1][0] == "--memory_budget"
    present = planner.on(config, card, made).memory["total"]
    for line in flags:
        changed, _ = parse_train(["--recipe", str(ROOT / "recipes/lavin-7b-lite.yaml"), *line])
        assert planner.on(changed, card).memory["total"] <= 0.97 * present
    assert not any(flag[0].startswith("--bits") for flag in flags)
