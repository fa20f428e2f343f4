"""Every line of LaVIN's training scripts, typed as it is there, in a folder like LaVIN's with tiny models in it.

Ports are the scripts' own unless somebody listens there. Where torch sees a GPU, --runtime.device cpu is added: the
scripts name more cards than a machine may have, and the ranks meet through gloo.
"""

from __future__ import annotations

import json
import os
import shlex
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
from tests.end_to_end.lavin_home import NUM_TEST, make_home

SHARED = "--adapter_type attn --adapter_dim 8 --adapter_scale 1 --n_prompt 6 --prompt_format QCM-ALE --max_seq_len 512"
TRAIN = (
    "train.py --llama_model_path ../data/weights/ --data_path ../data/alpaca_data.json --blr 9e-3 --weight_decay 0.02 "
    f"{SHARED} --visual_adapter_type router"
)
EVAL = (
    "eval.py --ckpt_dir ../data/weights/ --tokenizer_path ../data/weights/tokenizer.model --data_root ../data "
    f"--caption_file ../data/captions.json {SHARED} --visual_adapter_type router --max_batch_size 64 --split test"
)
SAMPLES_A_STEP = 32
STEPS_AN_EPOCH = 2
"""LaVIN's 12,726 // 32 = 397 are 64 // 32 here."""


@dataclass(frozen=True)
class Script:
    """A script's two lines. The chat scripts have no second one; here it is the 13B script's, on their file."""

    launch: str
    train: str
    launch_eval: str
    eval: str
    output_dir: str
    epochs: int = 20


SMALL = "--llm_model 7B --temperature 10."
LARGE = "--llm_model 13B --temperature 5."
ON_8 = "torchrun --nproc_per_node 8 --master_port 12345"
ON_1 = "torchrun --nproc_per_node 1"
LITE = "--batch_size 1 --accum_iter 32 --gradient_checkpointing --bits 4bit --cpu_load"

SCRIPTS = {
    "finetuning_sqa_7b_lite.sh": Script(
        "CUDA_VISIBLE_DEVICES=2 torchrun --nproc_per_node 1 --master_port 11111", f"{SMALL} {LITE}",
        "CUDA_VISIBLE_DEVICES=2 torchrun --nproc_per_node 1", f"{SMALL} --bits 4bit --cpu_load",
        "./LaVIN-7B-lite/",
    ),
    "finetuning_sqa_7b.sh": Script(
        "CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 --master_port 11111", f"{SMALL} --batch_size 4 --accum_iter 4",
        "CUDA_VISIBLE_DEVICES=2 torchrun --nproc_per_node 1 --master_port 11111", SMALL,
        "./LaVIN-7B/",
    ),
    "finetuning_sqa_vicuna_7b.sh": Script(
        "torchrun --nproc_per_node 2 --master_port 12345 --nproc_per_node 2",
        f"{SMALL} --batch_size 4 --accum_iter 4 --use_vicuna",
        ON_1, f"{SMALL} --use_vicuna=True",
        "./LaVIN-Vicuna-7B/",
    ),
    "finetuning_sqa_13b_lite.sh": Script(
        ON_1, f"{LARGE} {LITE}",
        ON_1, f"{LARGE} --bits 4bit",
        "./LaVIN-13B-lite/",
    ),
    "finetuning_sqa_13b.sh": Script(
        ON_8, f"{LARGE} --batch_size 4 --accum_iter 1",
        ON_1, LARGE,
        "./LaVIN-13B/",
    ),
    "finetuning_sqa_vicuna_13b.sh": Script(
        f"{ON_8} --nproc_per_node 8", f"{LARGE} --batch_size 4 --accum_iter 1 --use_vicuna",
        ON_1, f"{LARGE} --use_vicuna=True",
        "./LaVIN-Vicuna-13B/",
    ),
    "vl_instruction_tuning_13b.sh": Script(
        f"{ON_8} --nproc_per_node 8", f"{LARGE} --batch_size 4 --accum_iter 1 --do_pretrain",
        ON_1, LARGE,
        "./LaVIN-13B-VLIT/", epochs=15,
    ),
    "vl_instruction_tuning_vicuna_13b.sh": Script(
        f"{ON_8} --nproc_per_node 8", f"{LARGE} --batch_size 4 --accum_iter 1 --do_pretrain --use_vicuna",
        ON_1, f"{LARGE} --use_vicuna=True",
        "./LaVIN-Vicuna-13B-VLIT/", epochs=15,
    ),
}  # fmt: skip
IN_MAKE_TEST = ("finetuning_sqa_7b_lite.sh", "finetuning_sqa_7b.sh")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("lavin"))


def type_line(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In the folder LaVIN/, with this interpreter's torchrun, and without any cache of CLIP's weights."""
    if torch.cuda.is_available() and "train.py" in line:
        line += " --runtime.device cpu"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(home), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", _on_a_free_port(line)], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-4000:]}"
    return done


def _on_a_free_port(line: str) -> str:
    launcher, script, rest = line.partition(".py ")
    words = launcher.split(" ")
    place = words.index("--master_port") + 1 if "--master_port" in words else None
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(words[place]) if place else 29500))
            return line
        except OSError:
            listener.bind(("", 0))
            port = str(listener.getsockname()[1])
