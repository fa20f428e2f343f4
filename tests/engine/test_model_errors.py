"""`train.py` on models that are damaged, of another kind or of another width: the exit code, the names, what to do, and
nothing loaded by half."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import train
from engine.errors import run_command
from kernels.nf4 import quantize_nf4
from kernels.nf4_bitsandbytes import to_serialized
from models.adapters.lora import LoRAConfig
from models.weights.lora_files import write_peft
from tests.engine.tiny_folders import DIM, LANGUAGES, VOCABULARY, WIDTH, make_home, write_language, write_tower

USAGE, DATA, CHECKPOINT = 2, 3, 7
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
LORA = ["--train.language", "lora", "--lora.rank", "4"]
Refused = Callable[..., str]
Changed = Callable[[Callable[[dict[str, Tensor]], object]], Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"), shards=2)


@pytest.fixture
def refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Types train.py with these flags on home's Phi, SigLIP and rows; returns the error. It ended with this code and no
    traceback, exit.json says so, and neither a checkpoint nor a cache of weights was written."""
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / "cache"))

    def run(code: int, *flags: object) -> str:
        output = tmp_path / "run"
        typed = [
            "--data", home / "rows.json", "--image_folder", home, "--model.language", home / "phi", "--model.vision",
            home / "siglip", "--optim.batch_size", 4, "--dataset.max_seq_len", 160, "--output_dir", output, *flags,
        ]  # fmt: skip
        found = run_command(train.main, [str(word) for word in typed])
        errors = capsys.readouterr().err
        assert found == code, errors
        assert "Traceback" not in errors
        told = json.loads((output / "exit.json").read_text())
        assert told["code"] == code and told["reason"] in errors
        assert not list(output.glob("step-*")) and not list(tmp_path.glob("cache/weights/*/*"))
        return errors

    return run


@pytest.fixture
def language(home: Path, tmp_path: Path) -> Changed:
    """A copy of home's Phi with a change to the tensors of its second shard."""

    def write(change: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(home / "phi", folder)
        tensors = load_file(folder / SECOND)
        change(tensors)
        save_file(tensors, folder / SECOND, {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        kept = {name: file for name, file in index["weight_map"].items() if file == FIRST}
        index["weight_map"] = kept | dict.fromkeys(tensors, SECOND)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


def assert_says(error: str, *parts: str) -> None:
    for part in parts:
        assert part in error, f"no {part!r} in\n{error}"


# The language model's files


def test_a_missing_an_extra_and_a_misshapen_tensor(language: Changed, refused: Refused) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.fc1.bias"]
        tensors["model.layers.1.mlp.fc3.weight"] = torch.zeros(2, 2)
        tensors["model.layers.1.mlp.fc2.weight"] = torch.zeros(DIM, 40)

    folder = language(change)
    for more in ([], [*LORA, "--bits", "4bit"]):
        assert_says(
            refused(CHECKPOINT, "--model.language", folder, *more), str(folder),
            "missing (1): model.layers.1.mlp.fc1.bias", "extra (1): model.layers.1.mlp.fc3.weight",
            "mismatched (1): model.layers.1.mlp.fc2.weight: got 32x40, expected 32x48",
        )  # fmt: skip


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, refused: Refused) -> None:
    folder = write_language(tmp_path / "phi", "phi", tokens=VOCABULARY + 5)
    error = refused(DATA, "--model.language", folder)
    assert_says(error, "wrong tokenizer: it has 104 tokens, the language model 99", "--model.tokenizer")


def test_a_truncated_and_a_missing_shard(language: Changed, refused: Refused) -> None:
    folder = language(lambda tensors: None)
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(whole[: len(whole) // 2])
    assert_says(refused(CHECKPOINT, "--model.language", folder), SECOND, "damaged", "again")
    (folder / SECOND).unlink()
    assert_says(refused(CHECKPOINT, "--model.language", folder), SECOND, "missing")


class Harmful:
    """What a pickle must not run."""

    def __reduce__(self) -> Any:
        return (eval, ("__import__('os').mkdir('harmed')",))


def test_a_pickle_that_wants_more_than_tensors(
    home: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "phi"
    shutil.copytree(home / "phi", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    torch.save({"model.embed_tokens.weight": Harmful()}, folder / "pytorch_model.bin")
    assert_says(refused(CHECKPOINT, "--model.language", folder), "pytorch_model.bin", "eval")
    assert not (tmp_path / "harmed").exists()


def test_full_tuning_of_weights_that_are_quantized_in_their_files(tmp_path: Path, refused: Refused) -> None:
    folder = quantized(tmp_path / "phi")
    error = refused(USAGE, "--train.language", "full", "--bits", "16bit", "--model.language", folder)
    assert_says(error, "train.language full with weights of 4bit", "--train.language lora (or mma) --bits 4bit")
    error = refused(USAGE, *LORA, "--bits", "16bit", "--model.language", folder)
    assert_says(error, "bits is 16bit", "quantized to 4bit", "--bits 4bit")


def quantized(folder: Path) -> Path:
    """A Phi in bitsandbytes' NF4."""
    file = write_language(folder, "phi") / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if ".layers." in n and tensors[n].ndim == 2]:
        tensors |= {n: t.contiguous() for n, t in to_serialized(quantize_nf4(tensors[name], name), name).items()}
    save_file(tensors, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_folder_that_is_not_there(
    home: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`weights/7B` and `org/7B` look like names on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_says(refused(CHECKPOINT, "--model.language", "W/a/7B"), "no folder with the language model's weights")
    shutil.copytree(home / "clip", tmp_path / "weights" / "13B")
    error = refused(CHECKPOINT, "--model.language", "weights/7B")
    assert_says(error, "weights/7B is not there", "weights holds 13B", "--model.language")
    assert "hub" not in error
    error = refused(CHECKPOINT, "--model.language", "org/7B")
    assert_says(error, "org/7B is not there", "hub", "HF_HUB_OFFLINE")
    assert error.index("is not there") < error.index("hub")


# The tower


def test_a_tower_that_is_not_there(home: Path, refused: Refused) -> None:
    error = refused(CHECKPOINT, "--model.vision", home / "siglp")
    assert_says(error, f"no vision tower at {home / 'siglp'}", "--model.vision")


def test_a_file_that_is_no_eva(home: Path, tmp_path: Path, refused: Refused) -> None:
    torch.save({"epoch": 3, "state_dict": {"conv1.weight": torch.zeros(2)}}, tmp_path / "EVA.pt")
    error = refused(CHECKPOINT, "--model.vision", tmp_path / "EVA.pt")
    assert_says(error, str(tmp_path / "EVA.pt"), "no tensors of a vision tower that is known", "SigLIP")
    tensors = torch.load(write_tower(tmp_path / "eva", "eva"))
    del tensors["visual.blocks.1.mlp.w3.weight"]
    torch.save(tensors, tmp_path / "EVA.pt")
    error = refused(CHECKPOINT, "--model.vision", tmp_path / "EVA.pt")
    assert_says(error, "missing (1): visual.blocks.1.mlp.w3.weight")
    (tmp_path / "EVA.pt").write_text("<!DOCTYPE html>")
    assert_says(refused(CHECKPOINT, "--model.vision", tmp_path / "EVA.pt"), str(tmp_path / "EVA.pt"), "download")


def test_the_lavin_projector_needs_class_tokens(refused: Refused) -> None:
    error = refused(USAGE, "--model.projector", "lavin")
    assert_says(error, "model.projector lavin with a siglip tower", "--model.projector mlp2x_gelu")


def test_a_layer_that_the_tower_does_not_have(refused: Refused) -> None:
    assert_says(refused(USAGE, "--model.select_layer", -9), "-9", "--model.select_layer")


def test_image_tokens_that_do_not_fit(refused: Refused) -> None:
    error = refused(USAGE, "--dataset.max_seq_len", 16, "--model.select_feature", "patch")
    assert_says(error, "max_seq_len", "--dataset.max_seq_len")


# What training starts from


def test_a_lora_target_that_is_no_linear(refused: Refused) -> None:
    error = refused(USAGE, *LORA, "--lora.targets", "q_proj,gate_proj,lm_head")
    assert_says(error, "gate_proj, lm_head", "fc1, fc2")


def test_a_lora_of_another_base(tmp_path: Path, refused: Refused) -> None:
    lora = LoRAConfig(rank=4, alpha=16.0, targets=("attention.q",))
    wide = {"a": (4, 2 * DIM), "b": (2 * DIM, 4)}
    update = {f"layers.{i}.attention.q.lora.{side}": torch.zeros(size) for i in range(2) for side, size in wide.items()}
    write_peft(tmp_path / "lora", update, replace(LANGUAGES["phi"], dim=2 * DIM, num_heads=8, num_kv_heads=8), lora)
    error = refused(CHECKPOINT, *LORA, "--adapter.init", tmp_path / "lora")
    assert_says(
        error,
        str(tmp_path / "lora"),
        "q_proj.lora_A.weight: got 4x64, expected 4x32",
        "name the model it was trained on",
    )


def test_a_start_that_is_not_there(tmp_path: Path, refused: Refused) -> None:
    for flag in ("--adapter.init", "--model.projector_weights"):
        assert_says(refused(CHECKPOINT, flag, tmp_path / "lost.bin"), "lost.bin", "is not there", "do: name ")


def test_a_projector_of_another_width(tmp_path: Path, refused: Refused) -> None:
    sizes = {"0.weight": (DIM, 2 * WIDTH), "0.bias": (DIM,), "2.weight": (DIM, DIM), "2.bias": (DIM,)}
    file = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{name}": torch.zeros(size) for name, size in sizes.items()}, file)
    error = refused(CHECKPOINT, "--model.projector_weights", file)
    assert_says(error, str(file), "layers.0.weight: got 32x48, expected 32x24", "the tower's 24 channels")
