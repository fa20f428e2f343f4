"""What a person sees when a run cannot go on: the exit code, the message, and what stays on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval
import train
from engine.checkpoint import find_latest, load_checkpoint
from engine.errors import run_command
from engine.rundir import RunDir
from kernels import dispatch
from models.vlm import VisionLanguageModel
from tests.end_to_end.conftest import World
from tests.engine import faulty_files
from tests.world import make_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHORT = ["--optim.batch_size", 8, "--optim.epochs", 1, "--optim.warmup_epochs", 0, "--optim.lr", 0.02]  # 3 steps
EACH_STEP = [*SHORT, "--log.save_every", 1, "--log.keep", 9]


@dataclass
class Typed:
    """What came of a command."""

    code: int
    errors: str  # stderr
    run: Path

    def refused(self, code: int, *parts: str) -> None:
        """It ended with this code and a message with these parts, without a traceback."""
        assert self.code == code, self.errors
        for part in parts:
            assert part in self.errors, f"no {part!r} in\n{self.errors}"
        assert "Traceback" not in self.errors

    def failed(self, code: int, *parts: str) -> None:
        """The same of a run that had begun: exit.json has the code and the message, log.txt the traceback."""
        self.refused(code, *parts)
        told = json.loads((self.run / "exit.json").read_text())
        assert told["code"] == code and all(part in told["reason"] for part in parts)
        assert "Traceback" in (self.run / "log.txt").read_text()


Type = Callable[..., Typed]


@pytest.fixture
def type_(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Type:
    """Types `train.py FLAGS --output_dir tmp/run`, or another command."""

    def run(*flags: object, command: Any = train) -> Typed:
        words = [str(flag) for flag in flags]
        if command is train:
            words += ["--output_dir", str(tmp_path / "run")]
        code = run_command(command.main, words)
        return Typed(code, capsys.readouterr().err, tmp_path / "run")

    return run


@pytest.fixture
def rows(world: World, tmp_path: Path) -> Callable[[Callable[[list[Any]], None]], list[object]]:
    """Writes the world's rows with a change; returns the flags that name them."""

    def write(change: Callable[[list[Any]], None]) -> list[object]:
        content = json.loads(world.rows.read_text())
        change(content)
        path = tmp_path / "my.json"
        path.write_text(json.dumps(content))
        return [*world.base, *SHORT, "--optim.batch_size", 4, "--data", path, "--image_folder", world.rows.parent]

    return write


@pytest.fixture
def base(world: World, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], list[object]]:
    """Writes the world's language model with a change; returns the flags of a run on it."""

    def write(change: Callable[[dict[str, Tensor]], None]) -> list[object]:
        folder = tmp_path / "7B"
        shutil.copytree(world.root / "weights" / "7B", folder)
        tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / "consolidated.00.pth")
        tokenizer = world.root / "weights" / "tokenizer.model"
        return [*world.scienceqa, *SHORT, "--model.language", folder, "--model.tokenizer", tokenizer]

    return write


def weights(step: Path) -> dict[str, Tensor]:
    """In memory: a file that is mapped may change."""
    return {name: tensor.clone() for name, tensor in load_checkpoint(step)[0].items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Data


def test_a_missing_image(rows: Any, type_: Type) -> None:
    flags = rows(lambda content: content[2].update(image="gone.png"))
    type_(*flags).failed(3, "an image is missing", "gone.png", "my.json, row 3")


def test_a_broken_image(world: World, rows: Any, type_: Type, tmp_path: Path) -> None:
    """It is found when its step is prepared; the steps before it are done."""
    shutil.copytree(world.rows.parent, tmp_path / "pictures", ignore=shutil.ignore_patterns("*.json"))
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    flags = rows(lambda content: content[4].update(image="broken.png"))
    typed = type_(*flags, "--image_folder", tmp_path / "pictures")
    typed.failed(3, "an image cannot be read", "broken.png", "my.json, row 5")


def test_a_broken_image_of_scienceqa(world: World, type_: Type, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("weights"))
    (root / "images" / "train" / "5" / "image.png").write_bytes(b"")
    typed = type_(*world.base, *SHORT, "--dataset.root", root)
    typed.failed(3, "an image cannot be read", "problems.json, problem 5")


@pytest.mark.parametrize("text", ['[{"id": "a",}]', '[{"id": "a"', ""])
def test_broken_json(world: World, type_: Type, tmp_path: Path, text: str) -> None:
    path = tmp_path / "my.json"
    path.write_text(text)
    type_(*world.base, "--data", path).failed(3, "not valid JSON", str(path), "line 1, column")


def test_a_row_of_another_shape(rows: Any, type_: Type) -> None:
    flags = rows(lambda content: content[1]["conversations"].pop())
    type_(*flags).failed(3, "'conversations' must be pairs", "my.json, row 2")


def test_validation_rows_that_are_not_there(world: World, rows: Any, type_: Type, tmp_path: Path) -> None:
    flags = rows(lambda content: None)
    type_(*flags, "--eval_data", tmp_path / "none.json").failed(3, "cannot be read", "none.json")


def test_a_benchmark_that_is_not_there_is_missed_before_the_first_step(
    world: World, type_: Type, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("weights"))
    shutil.rmtree(root / "images" / "test")
    typed = type_(*world.base, *SHORT, "--dataset.root", root, "--log.evaluate", "after")
    typed.failed(3, "an image is missing", "problems.json, problem")
    assert not (typed.run / "metrics.jsonl").exists() and find_latest(typed.run) is None


def test_a_benchmark_that_is_not_there_is_not_missed_where_nobody_asks_for_it(
    world: World, type_: Type, tmp_path: Path
) -> None:
    """The report names the next commands after hours of training: it must not fail for want of one."""
    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("weights"))
    shutil.rmtree(root / "images" / "test")
    typed = type_(*world.base, *SHORT, "--dataset.root", root)
    assert typed.code == 0, typed.errors
    report = (typed.run / "REPORT.md").read_text()
    assert "chat.py" in report and "eval.py" not in report


def test_fewer_rows_than_a_step_takes(world: World, type_: Type) -> None:
    typed = type_(*world.scienceqa, "--optim.batch_size", 25)
    typed.failed(3, "the data has 24 samples, one step takes 25", "--optim.batch_size")


# Tokenizer and weights


def test_a_tokenizer_that_is_none(world: World, type_: Type, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    typed = type_(*world.scienceqa, "--model.tokenizer", path)
    typed.failed(3, "not a sentencepiece model", str(path), "git-lfs pointer")


def test_a_tokenizer_of_another_model(world: World, type_: Type, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.model", vocabulary=340)
    typed = type_(*world.scienceqa, "--model.tokenizer", tmp_path / "tokenizer.model")
    typed.failed(3, "wrong tokenizer: it has 340 pieces, the language model 330 embeddings")


@pytest.mark.parametrize("flag", ["--model.tokenizer", "--model.language", "--model.vision", "--adapter.init"])
def test_weights_that_are_not_there(world: World, type_: Type, tmp_path: Path, flag: str) -> None:
    type_(*world.scienceqa, *SHORT, flag, tmp_path / "nothing").failed(7, str(tmp_path / "nothing"))


def test_a_missing_tensor_in_the_base(base: Any, type_: Type) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["layers.1.attention.wk.weight"], tensors["norm.weight"]

    listed = ("missing (2): ", "layers.1.attention.wk.weight", "norm.weight", "consolidated.00.pth")
    type_(*base(change)).failed(7, *listed)


def test_a_misshapen_tensor_in_the_base(base: Any, type_: Type) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.feed_forward.w2.weight"] = torch.zeros(32, 64)

    type_(*base(change)).failed(7, "mismatched (1): layers.0.feed_forward.w2.weight: got 32x64, expected 32x72")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_where_it_is_quantized(base: Any, type_: Type, bits: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.attention.wv.weight"][3, 7] = value

    typed = type_(*base(change), "--bits", bits)
    typed.failed(7, f"layers.1.attention.v.weight: value {value} at [3, 7]", "finite weights only", "7B")


@pytest.fixture
def lavin_file(world: World, type_: Type) -> Path:
    """What LaVIN's next command would read after a short run."""
    typed = type_(*world.scienceqa, *SHORT, "--log.lavin_checkpoints")
    assert typed.code == 0
    return typed.run / "checkpoint-0.pth"


def change_file(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content["model"])
    torch.save(content, path)


ROUTER = "module.backbone.visual.transformer.resblocks.2.adapter_attn.expert_weights.weight"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_adapter_file_without_a_tensor(
    world: World, type_: Type, lavin_file: Path, tmp_path: Path, command: str
) -> None:
    change_file(lavin_file, lambda tensors: tensors.pop(ROUTER))
    listed = ("missing (1): ", ROUTER.removeprefix("module."), str(lavin_file))
    if command == "eval":
        type_(*world.scienceqa, "--adapter.init", lavin_file, command=eval).refused(7, *listed)
    else:
        lavin_file = lavin_file.rename(tmp_path / "checkpoint-0.pth")
        shutil.rmtree(tmp_path / "run")
        type_(*world.scienceqa, *SHORT, "--adapter.init", lavin_file).failed(7, *listed[:2])


def test_an_adapter_file_with_a_misshapen_tensor(world: World, type_: Type, lavin_file: Path) -> None:
    change_file(lavin_file, lambda tensors: tensors.update({ROUTER: torch.zeros(2, 31)}))
    name = ROUTER.removeprefix("module.")
    typed = type_(*world.scienceqa, "--adapter.init", lavin_file, command=eval)
    typed.refused(7, f"mismatched (1): {name}: got 2x31, expected 2x32")


# Flags


def test_an_unknown_flag(world: World, type_: Type) -> None:
    typed = type_(*world.scienceqa, "--optim.batchsize", 4)
    typed.refused(2, "unknown flag --optim.batchsize", "did you mean --optim.batch_size?")
    assert not typed.run.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train.language", "full", "--bits", "16bit", "--log.lavin_checkpoints"],
            "log.lavin_checkpoints with train",
        ),
        (["--train.vision", "full", "--log.lavin_checkpoints"], "log.lavin_checkpoints with train.vision full"),
        (["--train.language", "full", "--bits", "4bit"], "train.language full with bits 4bit"),
        (["--optim.epochs", "0"], "optim.epochs is 0"),
        (["--eval_data", "rows.json"], "eval_data without data"),
        (["--recipe", "none.yaml"], "cannot read 'none.yaml'"),
    ],
)
def test_flags_that_cannot_work(world: World, type_: Type, flags: list[str], message: str) -> None:
    typed = type_(*world.scienceqa, *flags)
    typed.refused(2, message)
    assert not typed.run.exists()


def test_scoring_a_benchmark_that_rows_of_ones_own_do_not_have(rows: Any, type_: Type) -> None:
    type_(*rows(lambda content: None), "--log.evaluate", "after").refused(2, "log.evaluate after with rows of your own")


def test_nothing_to_evaluate(world: World, type_: Type, tmp_path: Path) -> None:
    type_(*world.scienceqa, command=eval).refused(2, "nothing to evaluate")
    type_("--run", tmp_path / "none", command=eval).refused(2, "is no run directory")


def test_a_backend_that_cannot_run_here(world: World, type_: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_settings", {})  # the choice is the process's
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    typed = type_(*world.scienceqa, *SHORT, "--runtime.kernels", "triton", "--runtime.device", "cpu")
    typed.failed(4, "'triton' was chosen and cannot run (torch.float32 tensor on cpu)", "--runtime.kernels auto")


def test_debug_shows_the_traceback(world: World, type_: Type, tmp_path: Path) -> None:
    typed = type_(*world.scienceqa, "--model.language", tmp_path / "nothing", "--debug")
    assert typed.code == 7
    assert "Traceback" in typed.errors and typed.errors.rstrip().splitlines()[-1].startswith("  do: ")


def test_flags_without_effect_warn_on_the_terminal(world: World, type_: Type) -> None:
    typed = type_(*world.scienceqa, *SHORT, "--adapter.language", "block", "--train.language", "frozen")
    assert typed.code == 0
    assert "warning: --adapter.language block has no effect with --train.language frozen\n" in typed.errors


# The run directory


def test_a_run_directory_in_use(world: World, type_: Type, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run").claim() as other:
        other.write_exit(75, "of the other run")
        typed = type_(*world.scienceqa, *SHORT, "--resume", "auto")
        typed.refused(2, f"run directory in use by process {os.getpid()}", "--output_dir")
        assert json.loads(other.exit.read_text())["reason"] == "of the other run"


def test_a_finished_run_is_not_overwritten(world: World, type_: Type) -> None:
    first = type_(*world.scienceqa, *SHORT)
    assert first.code == 0
    before = {path: path.stat().st_mtime_ns for path in first.run.rglob("*") if path.name != ".lock"}
    type_(*world.scienceqa, *SHORT).refused(2, "already holds a finished run", "another --output_dir")
    assert {path: path.stat().st_mtime_ns for path in first.run.rglob("*") if path.name != ".lock"} == before


# Two ranks, without a launcher that would end the one when the other is gone


def type_on_two_ranks(flags: list[object], run: Path) -> tuple[list[int], list[str]]:
    """Exit codes and errors of rank 0 and rank 1."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, REPOSITORY / "train.py", *flags, "--output_dir", run, "--runtime.device", "cpu"]
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env=os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def test_all_ranks_leave_when_the_run_directory_is_in_use(world: World, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run").claim():
        codes, errors = type_on_two_ranks([*world.scienceqa, *SHORT], tmp_path / "run")
    assert codes == [2, 2]
    assert ["run directory in use" in text for text in errors] == [True, False]
    assert not any("Traceback" in text for text in errors)


def test_the_rank_that_knows_why_tells_it(world: World, tmp_path: Path) -> None:
    """A picture of the second rank is broken; the first one only sees that the second is gone."""
    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("weights"))
    (root / "images" / "train" / "9" / "image.png").write_bytes(b"")  # in the second pack of step 0 with seed 0
    run = tmp_path / "run"
    codes, errors = type_on_two_ranks([*world.base, *SHORT, "--dataset.root", root], run)
    assert codes == [1, 3], errors
    assert ["problem 9" in text for text in errors] == [False, True]
    assert not any("Traceback" in text for text in errors)
    told = json.loads((run / "exit.json").read_text())
    assert told["code"] == 3 and "problem 9" in told["reason"]
    log = (run / "log.txt").read_text()
    assert "the run ended with an error on rank 1" in log and "UnidentifiedImageError" in log


def test_both_ranks_resume_from_the_step_that_the_first_one_found(world: World, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", [*world.scienceqa, *EACH_STEP, "--optim.batch_size", 4]
    assert type_on_two_ranks(flags, run)[0] == [0, 0]
    whole = weights(run / "step-3")
    (run / "step-3" / "model.safetensors").write_bytes(b"")
    codes, errors = type_on_two_ranks([*flags, "--resume", "auto"], run)
    assert codes == [0, 0], errors
    assert ["step-3 is damaged" in text for text in errors] == [True, False]
    assert f"resumed from {run / 'step-2'}" in errors[0]
    assert same(weights(run / "step-3"), whole)


# Disk, numbers, checkpoints


@contextmanager
def full_disk(operation: str, path: str, *, for_good: bool = False) -> Iterator[None]:
    """The disk is full for this operation on such paths; `for_good`: from the first time on for every new file."""
    failures: list[str] = []

    def fail(number: int) -> None:
        name, where = log[number][:2]
        is_new_file = name == "create" and "/.tmp-" in where
        if (name == operation and path in where) or (for_good and failures and is_new_file):
            failures.append(where)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with faulty_files.numbered_operations(fail) as log:
        yield
    assert failures


@pytest.mark.parametrize(
    ("path", "for_good", "left"),
    [
        (".tmp-step-2-", False, 1),
        (".tmp-step-2-", True, 1),  # exit.json cannot be written either
        (".tmp-checkpoint-0.pth", False, 2),
    ],
)
def test_a_disk_that_is_full_until_somebody_makes_room(
    world: World, type_: Type, tmp_path: Path, path: str, for_good: bool, left: int
) -> None:
    flags = [*world.scienceqa, *EACH_STEP, "--log.lavin_checkpoints"]
    whole = weights(type_(*flags).run / "step-3")
    (tmp_path / "run").rename(tmp_path / "whole")
    with full_disk("write", path, for_good=for_good):
        typed = type_(*flags)
    check = typed.refused if for_good else typed.failed
    check(7, "cannot save", "No space left on device", "make room")
    assert find_latest(typed.run) == typed.run / f"step-{left}"
    assert not list(typed.run.glob(".tmp-*"))
    assert type_(*flags, "--resume", "auto").code == 0
    assert same(weights(typed.run / "step-3"), whole)


def test_a_disk_without_room_for_the_next_checkpoint(
    world: World, type_: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = shutil.disk_usage, []

    def usage(path: Path) -> Any:
        asked.append(path)
        return real(path) if len(asked) == 1 else real(path)._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    typed = type_(*world.scienceqa, *EACH_STEP)
    typed.failed(7, "checkpoint step-2 needs", "0.00 GB are free", "--resume auto")
    assert find_latest(typed.run) == typed.run / "step-1"


def test_metrics_that_cannot_be_written(world: World, type_: Type) -> None:
    with full_disk("write", "metrics.jsonl"):
        typed = type_(*world.scienceqa, *SHORT)
    typed.failed(4, "No space left on device")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite(
    world: World, type_: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """No weight changes, the checkpoints stay, and the run goes on once the cause is gone."""
    flags = [*world.scienceqa, *EACH_STEP]
    whole = weights(type_(*flags).run / "step-3")
    (tmp_path / "run").rename(tmp_path / "whole")
    seen: list[tuple[VisionLanguageModel, dict[str, Tensor]]] = []
    forward = VisionLanguageModel.forward

    def third_is_bad(self: VisionLanguageModel, *args: Any) -> Tensor:
        if self.language.embed.weight.is_meta:  # the plan counts what a pass takes
            return forward(self, *args)
        seen.append((self, {name: p.detach().clone() for name, p in self.trainable().items()}))
        loss = forward(self, *args)
        if len(seen) == 3:
            if where == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(VisionLanguageModel, "forward", third_is_bad)
        typed = type_(*flags)
    typed.failed(6, "step 2: loss ", "nan", "no weight was changed by this step")
    model, before = seen[2]
    assert same({name: p.detach() for name, p in model.trainable().items()}, before)
    assert find_latest(typed.run) == typed.run / "step-2"
    assert type_(*flags, "--resume", "auto").code == 0
    assert same(weights(typed.run / "step-3"), whole)


def test_a_base_that_is_not_finite_at_16_bits(base: Any, type_: Type) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.attention.wq.weight"][0, 0] = float("inf")

    typed = type_(*base(change), "--bits", "16bit")
    typed.failed(6, "step 0: loss nan")
    assert find_latest(typed.run) is None


# Resuming


def test_nothing_to_resume(world: World, type_: Type, tmp_path: Path) -> None:
    """`auto` begins, so that one line can be repeated until it is through; a step that was named must be there."""
    typed = type_(*world.scienceqa, *SHORT, "--resume", tmp_path / "run" / "step-3")
    typed.failed(7, f"no checkpoint {tmp_path / 'run' / 'step-3'}")
    typed = type_(*world.scienceqa, *SHORT, "--resume", "auto")
    assert typed.code == 0 and "nothing to resume" in typed.errors
    assert find_latest(typed.run) == typed.run / "step-3"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--seed", 1], ["trained with seed 0, 8 of 24 samples a step; this command says seed 1, 8 of 24"]),
        (["--optim.batch_size", 4], ["this command says seed 0, 4 of 24 samples a step"]),
        (["--dataset.split", "trainval"], ["this command says seed 0, 8 of 36 samples a step"]),
        (["--adapter.dim", 4], ["trained with other settings", "adapter.dim: 8, now 4"]),
        (["--optim.lr", 0.1, "--bits", "16bit"], ["bits: '4bit', now '16bit'; optim.lr: 0.02, now 0.1"]),
    ],
)
def test_resuming_as_another_run(world: World, type_: Type, flags: list[object], parts: list[str]) -> None:
    first = type_(*world.scienceqa, *SHORT)
    config = (first.run / "config.yaml").read_text()
    typed = type_(*world.scienceqa, *SHORT, *flags, "--resume", "auto")
    typed.failed(7, *parts, "config.yaml")
    assert (typed.run / "config.yaml").read_text() == config, "what the message points to is gone"
    assert find_latest(typed.run) == typed.run / "step-3"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--adapter.dim", 4], ["mismatched (", "down.weight: got 8x32, expected 4x32"]),
        (["--train.vision", "frozen"], ["extra (", "vision.layers.0.attention_adapter"]),
        (["--adapter.language", "block"], ["missing (", "language.layers.0.mlp_adapter"]),
    ],
)
def test_starting_from_a_run_that_trained_other_tensors(
    world: World, type_: Type, tmp_path: Path, flags: list[object], parts: list[str]
) -> None:
    first = type_(*world.scienceqa, *SHORT).run.rename(tmp_path / "first")
    typed = type_(*world.scienceqa, *SHORT, *flags, "--adapter.init", first)
    typed.failed(7, *parts, str(first / "step-3"), "config.yaml")


def test_resuming_on_another_base(world: World, base: Any, type_: Type) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.attention.wv.weight"][3, 7] = 0.5

    assert type_(*world.scienceqa, *SHORT).code == 0
    typed = type_(*base(change), "--resume", "auto")
    typed.failed(7, "are not the base weights that the run was trained on", "consolidated.00.pth")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(world: World, type_: Type) -> None:
    flags = [*world.scienceqa, *EACH_STEP]
    first = type_(*flags)
    whole = weights(first.run / "step-3")
    file = first.run / "step-3" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    typed = type_(*flags, "--resume", "auto")
    assert typed.code == 0
    assert "skipped a damaged checkpoint" in typed.errors and "optimizer.safetensors has crc32" in typed.errors
    assert f"resumed from {first.run / 'step-2'}" in typed.errors
    assert same(weights(first.run / "step-3"), whole)


def test_no_checkpoint_is_whole(world: World, type_: Type) -> None:
    first = type_(*world.scienceqa, *SHORT)
    (first.run / "step-3" / "manifest.json").unlink()
    typed = type_(*world.scienceqa, *SHORT, "--resume", "auto")
    typed.failed(7, "no whole checkpoint among step-3")
