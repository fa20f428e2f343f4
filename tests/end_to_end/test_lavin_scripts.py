"""Every line of LaVIN's eight training scripts, in a folder like LaVIN's with tiny models in the place of 7B and 13B.

The lines are typed as they stand there, ports and card numbers included. Two things may differ: a port that somebody
listens to is replaced, and --runtime.device cpu is added where torch sees a GPU (the scripts name up to eight of them).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import eval
from engine.checkpoint import load_checkpoint
from engine.errors import run_command
from models.weights.lavin import read_lavin_adapters, read_lavin_args
from tests.end_to_end.lavin_home import NUM_CHAT, NUM_TEST, NUM_TRAIN, make_home

SHARED = (
    "--max_seq_len 512 --adapter_type attn --adapter_dim 8 --adapter_scale 1 --n_prompt 6 --prompt_format QCM-ALE "
    "--visual_adapter_type router"
)
TRAIN = (
    f"--llama_model_path ../data/weights/ --data_path ../data/alpaca_data.json --blr 9e-3 --weight_decay 0.02 {SHARED}"
)
EVAL = (
    "--ckpt_dir ../data/weights/ --tokenizer_path ../data/weights/tokenizer.model --data_root ../data "
    f"--caption_file ../data/captions.json --max_batch_size 64 --split test {SHARED}"
)
SMALL, LARGE = "--llm_model 7B --temperature 10.", "--llm_model 13B --temperature 5."
SQA, CHAT = "--epochs 20 --warmup_epochs 2", "--epochs 15 --warmup_epochs 0.2 --do_pretrain"
ON_1, ON_8 = "torchrun --nproc_per_node 1", "torchrun --nproc_per_node 8 --master_port 12345"
TWICE = "--nproc_per_node 8"  # so in the scripts
LITE = "--batch_size 1 --accum_iter 32 --gradient_checkpointing --bits 4bit --cpu_load"
SAMPLES_A_STEP = 32


@dataclass(frozen=True)
class Script:
    """Its two lines without what all of them share, and the folder between them.

    The chat scripts end with the training line. What reads their file is what follows eval.py in the evaluation line of
    the same model.
    """

    output_dir: str
    train: tuple[str, str]  # launcher, flags
    evaluate: tuple[str, str]  # the same; no launcher where the script has no such line
    epochs: int = 20
    num_samples: int = NUM_TRAIN

    @property
    def lines(self) -> tuple[str, str]:
        (launcher, flags), (launcher_2, flags_2) = self.train, self.evaluate
        file = f"{self.output_dir}checkpoint-{self.epochs - 1}.pth"
        return (
            f"{launcher} train.py {TRAIN} {flags} --output_dir {self.output_dir}",
            f"{launcher_2} eval.py {EVAL} {flags_2} --adapter_path {file}".strip(),
        )


SCRIPTS = {
    "finetuning_sqa_7b_lite.sh": Script(
        "./LaVIN-7B-lite/",
        ("CUDA_VISIBLE_DEVICES=2 torchrun --nproc_per_node 1 --master_port 11111", f"{SMALL} {SQA} {LITE}"),
        ("CUDA_VISIBLE_DEVICES=2 torchrun --nproc_per_node 1", f"{SMALL} --bits 4bit --cpu_load"),
    ),
    "finetuning_sqa_7b.sh": Script(
        "./LaVIN-7B/",
        (
            "CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 --master_port 11111",
            f"{SMALL} {SQA} --batch_size 4 --accum_iter 4",
        ),
        ("CUDA_VISIBLE_DEVICES=2 torchrun --nproc_per_node 1 --master_port 11111", SMALL),
    ),
    "finetuning_sqa_vicuna_7b.sh": Script(
        "./LaVIN-Vicuna-7B/",
        (
            "torchrun --nproc_per_node 2 --master_port 12345 --nproc_per_node 2",
            f"{SMALL} {SQA} --batch_size 4 --accum_iter 4 --use_vicuna",
        ),
        (ON_1, f"{SMALL} --use_vicuna=True"),
    ),
    "finetuning_sqa_13b_lite.sh": Script(
        "./LaVIN-13B-lite/", (ON_1, f"{LARGE} {SQA} {LITE}"), (ON_1, f"{LARGE} --bits 4bit")
    ),
    "finetuning_sqa_13b.sh": Script(
        "./LaVIN-13B/", (ON_8, f"{LARGE} {SQA} --batch_size 4 --accum_iter 1"), (ON_1, LARGE)
    ),
    "finetuning_sqa_vicuna_13b.sh": Script(
        "./LaVIN-Vicuna-13B/",
        (f"{ON_8} {TWICE}", f"{LARGE} {SQA} --batch_size 4 --accum_iter 1 --use_vicuna"),
        (ON_1, f"{LARGE} --use_vicuna=True"),
    ),
    "vl_instruction_tuning_13b.sh": Script(
        "./LaVIN-13B-VLIT/",
        (f"{ON_8} {TWICE}", f"{LARGE} {CHAT} --batch_size 4 --accum_iter 1"),
        ("", LARGE),
        epochs=15,
        num_samples=NUM_CHAT,
    ),
    "vl_instruction_tuning_vicuna_13b.sh": Script(
        "./LaVIN-Vicuna-13B-VLIT/",
        (f"{ON_8} {TWICE}", f"{LARGE} {CHAT} --batch_size 4 --accum_iter 1 --use_vicuna"),
        ("", f"{LARGE} --use_vicuna=True"),
        epochs=15,
        num_samples=NUM_CHAT,
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("lavin"))


def type_line(line: str, home: Path) -> str:
    """Types a line in LaVIN/, where no cache of CLIP's weights is found. Returns its output, errors included."""
    if torch.cuda.is_available():
        line += " --runtime.device cpu"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home), "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["sh", "-c", with_free_port(line)], cwd=home, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\nended with {done.returncode}:\n{done.stdout[-5000:]}"
    return done.stdout


def evaluate_here(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What follows eval.py in a line, in this process. Returns its output, errors included."""
    cpu = ["--runtime.device", "cpu"] if torch.cuda.is_available() else []
    code = run_command(eval.main, [*line.removeprefix("eval.py ").split(), *cpu])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out + printed.err


def with_free_port(line: str) -> str:
    """The line as it is, or with another --master_port where its own (torchrun's default: 29500) is taken."""
    launcher, space, rest = line.partition(" --master_port ")
    port = rest.split()[0] if space else "29500"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(port)))
            return line
        except OSError:
            listener.bind(("", 0))
            free = listener.getsockname()[1]
    if space:
        return f"{launcher} --master_port {free} {rest.partition(' ')[2]}"
    return line.replace("torchrun", f"torchrun --master_port {free}", 1)


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_script(name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = SCRIPTS[name]
    train_line, eval_line = script.lines
    type_line(train_line, home)
    run, last = home / script.output_dir, script.epochs - 1
    state = check_run(run, script, vicuna="--use_vicuna" in train_line)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    written = read_lavin_adapters(run / f"checkpoint-{last}.pth", shapes)
    assert all(torch.equal(written[name], state[name]) for name in state)

    monkeypatch.chdir(home)  # the lines' paths are relative
    output = type_line(eval_line, home) if "torchrun" in eval_line else evaluate_here(eval_line, capsys)
    assert "was trained with router temperature" not in output
    scores = json.loads((run / "eval-scienceqa-test.json").read_text())
    assert scores["problems"] == NUM_TEST and 0 <= scores["acc_average"] <= 100
    assert f"{scores['acc_average']:.2f}" in output

    ours = run / "ours.json"
    assert run_command(eval.main, ["--run", script.output_dir, "--output", str(ours)]) == 0, capsys.readouterr().err
    assert json.loads(ours.read_text())["predictions"] == scores["predictions"]
    assert len(set(scores["predictions"].values())) > 1, "the comparison says little: all answers are the same"


def check_run(run: Path, script: Script, *, vicuna: bool) -> dict[str, torch.Tensor]:
    """A whole run with LaVIN's file after each epoch. Returns what it trained."""
    epochs, steps = script.epochs, script.epochs * (script.num_samples // SAMPLES_A_STEP)
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    files = {path.name for path in run.glob("checkpoint-*.pth")}
    assert files == {f"checkpoint-{epoch}.pth" for epoch in range(epochs)}
    last = run / f"checkpoint-{epochs - 1}.pth"
    saved = torch.load(last, weights_only=True)
    assert saved["epoch"] == epochs - 1
    assert all(name.startswith("module.") and "adapter" in name for name in saved["model"])
    assert read_lavin_args(last)["temperature"] in (5.0, 10.0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == steps and rows[-1]["loss"] < rows[0]["loss"] - 0.01
    tensors, state = load_checkpoint(run / f"step-{steps}")
    assert state["samples_per_step"] == SAMPLES_A_STEP
    folders = {Path(file["path"]).parent.name for file in state["base"]["files"]}
    assert "clip-vit-large-patch14" in folders
    assert any(folder.startswith("vicuna_") for folder in folders) == vicuna
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}
