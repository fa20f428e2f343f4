"""--memory_budget from the command line to the checkpoint, and on resuming."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from engine import settle
from engine.checkpoint import find_latest, load_checkpoint
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel
from tests.end_to_end.conftest import Train, World

SHORT = ["--optim.batch_size", "8", "--optim.epochs", "1", "--optim.warmup_epochs", "0.5", "--optim.lr", "0.02"]
SOME = ["--memory_budget", "9MB"]  # of a run that would take 10 MiB
ALL, LEANEST = (ActivationPolicy.uniform(policy, 2, 6) for policy in ("save_all", "keep_input"))


def checkpoint(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    step = find_latest(run)
    assert step is not None
    return load_checkpoint(step)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[ActivationPolicy]:
    """The policies that models were given, without those of models that only count."""
    found: list[ActivationPolicy] = []
    real = VisionLanguageModel.use_activation_policy

    def use(model: VisionLanguageModel, policy: ActivationPolicy) -> None:
        if not model.modality_embedding.weight.is_meta:
            found.append(policy)
        real(model, policy)

    monkeypatch.setattr(VisionLanguageModel, "use_activation_policy", use)
    return found


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[], tuple[str, bool]]:
    """What the run before said that its layers keep, the same in its plan, and whether it warned."""

    def read() -> tuple[str, bool]:
        error = capfd.readouterr().err
        *_, planned = re.findall(r"^memory .*predicted.*(language: .*; vision: .*)$", error, re.MULTILINE)
        *_, kept = re.findall(r"^keeps +(.*)$", error, re.MULTILINE)
        assert kept.startswith(f"{planned} (")
        return kept, "expect to run out of memory" in error

    return read


def test_a_budget_changes_what_layers_keep_and_no_bit(
    world: World, type_train: Train, tmp_path: Path, kept: list[ActivationPolicy],
    said: Callable[[], tuple[str, bool]],
) -> None:  # fmt: skip
    lines = {"all": [], "some": SOME, "tight": ["--memory_budget", "1MB"], "flag": ["--gradient_checkpointing"]}
    reasons = {}
    for name, flags in lines.items():
        assert type_train(*world.scienceqa, *SHORT, *flags, name=name) == 0
        text, warned = said()
        assert text.startswith(kept[-1].describe()) and warned == (name == "tight")
        reasons[name] = text.partition(" (")[2]
    first, some, tight, flag = kept
    assert (first, tight, flag) == (ALL, LEANEST, LEANEST) and some not in (ALL, LEANEST)
    assert reasons["all"] == "on a CPU, without --memory_budget)" and reasons["flag"] == "--gradient_checkpointing)"
    assert re.match(
        r"a pack of 2,048 tokens is predicted to take [\d.]+ MiB, [\d.]+ MiB are free; \d+ ms of", reasons["some"]
    )
    weights, state = checkpoint(tmp_path / "all")
    assert state["activation_policy"] == ALL.to_json() and state["spare_memory"] == 0
    for name, policy in (("some", some), ("tight", LEANEST), ("flag", LEANEST)):
        found, state = checkpoint(tmp_path / name)
        assert state["activation_policy"] == policy.to_json()
        assert [n for n, tensor in weights.items() if not torch.equal(found[n], tensor)] == []


def test_a_resumed_run_takes_up_the_choice_unless_its_command_asks_for_another(
    world: World, type_train: Train, monkeypatch: pytest.MonkeyPatch, kept: list[ActivationPolicy],
    said: Callable[[], tuple[str, bool]],
) -> None:  # fmt: skip
    assert type_train(*world.scienceqa, *SHORT, *SOME) == 0
    more = [*world.scienceqa, *SHORT, "--resume", "auto", "--optim.epochs"]
    assert type_train(*more, 2, "--gradient_checkpointing") == 0  # config.yaml now asks for it
    assert "--gradient_checkpointing" in said()[0]

    def counting(*_: object, **__: object) -> NoReturn:
        raise AssertionError("counted anew")

    monkeypatch.setattr(settle, "choose", counting)
    assert type_train(*more, 3, "--gradient_checkpointing") == 0
    assert said()[0].endswith("(as the run that is resumed)")
    assert kept[0] not in (ALL, LEANEST) and kept[1:] == [LEANEST, LEANEST]
