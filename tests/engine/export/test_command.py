"""export.py from its command line: checkpoints become one another, LoRA are merged, checkpoints are averaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from engine.errors import CheckpointError, UsageError, run_command
from engine.export.config import ExportConfig, check_export, parse_average
from engine.export.folder import new_folder
from engine.export.formats import plan_llava, plan_merged
from engine.flags import parse_export
from models.weights.checkpoint import open_checkpoint
from models.weights.errors import WeightsError
from models.weights.write.llava import folder_notes
from tests.engine.export.made_up import (
    ANYRES,
    VOCABULARY,
    assert_same_tensors,
    export_config,
    language_folder,
    origin_of,
    random_lora,
    settings_of,
    tensors_of,
    tower_folder,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A whole LLaVA-NeXT checkpoint."""
    language, tower = language_folder(tmp_path / "language", "llama"), tower_folder(tmp_path / "tower", "clip")
    origin = origin_of(language, tower, settings_of(tower, **ANYRES))
    folder = tmp_path / "llava"
    folder.mkdir()
    plan_merged(origin, export_config(folder)).write(folder)
    return folder


def run(*argv: object) -> None:
    assert export.main([str(word) for word in argv]) == 0


def test_llava_to_transformers_and_back(tmp_path: Path, llava: Path) -> None:
    run("--checkpoint", llava, "--to", "llava-hf", "--output", tmp_path / "hf")
    run("--checkpoint", tmp_path / "hf", "--to", "merged", "--output", tmp_path / "again")
    run("--checkpoint", tmp_path / "again", "--to", "llava-hf", "--output", tmp_path / "hf2")
    first, second = tensors_of(open_checkpoint(llava)), tensors_of(open_checkpoint(tmp_path / "again"))
    assert second["language.embed.weight"].shape[0] == 128  # with the rows that <image> needs
    for name in ("language.embed.weight", "language.head.weight"):
        second[name] = second[name][:VOCABULARY]
    assert_same_tensors(second, first)
    assert json.loads((tmp_path / "hf2" / "config.json").read_text())["text_config"]["vocab_size"] == 128
    assert_same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf2")))


@pytest.mark.parametrize(
    ("name", "model_type", "is_lora", "notes"),
    [
        ("llava-x", "llava_llama", False, []),
        ("x", "llava_llama", False, ["looks for 'llava'"]),
        ("llava-lora", "llava_llama", False, ["a name without 'lora'"]),
        ("x", "bunny-phi", True, ["'lora' in its name"]),
        ("x", "imp", True, ["looks for 'imp'", "'lora' in its name"]),
        ("x", "llama", False, []),
    ],
)
def test_names_that_other_loaders_go_by(
    tmp_path: Path, name: str, model_type: str, is_lora: bool, notes: list[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if is_lora:
        (folder / "adapter_config.json").write_text("{}")
    found = folder_notes(folder)
    assert len(found) == len(notes) and all(part in note for part, note in zip(notes, found, strict=True))


def test_the_language_model_of_a_vlm(tmp_path: Path, llava: Path) -> None:
    run("--checkpoint", llava, "--to", "hf", "--output", tmp_path / "hf")
    back = open_checkpoint(tmp_path / "hf")
    assert back.kind == "language"
    expected = {n: t for n, t in tensors_of(open_checkpoint(llava)).items() if n.startswith("language.")}
    assert_same_tensors(tensors_of(back), expected)


def test_a_lora_on_its_base(tmp_path: Path) -> None:
    """The LoRA of a training on a language model: its folder has the projector, its base the weights."""
    language, tower = language_folder(tmp_path / "language", "phi3"), tower_folder(tmp_path / "tower", "siglip")
    origin = origin_of(language, tower, settings_of(tower), stage="lora")
    object.__setattr__(origin, "language_lora", random_lora(origin, ("attention.qkv", "mlp.down")))
    folder = tmp_path / "lora"
    folder.mkdir()
    plan_llava(origin, export_config(folder)).write(folder)
    expected = tmp_path / "expected"
    expected.mkdir()
    plan_merged(origin, export_config(expected)).write(expected)

    run("--checkpoint", folder, "--base", language, "--to", "merged", "--output", tmp_path / "merged")
    run("--checkpoint", folder, "--to", "merged", "--output", tmp_path / "said")  # adapter_config.json names the base
    for name in ("merged", "said"):
        assert_same_tensors(*(tensors_of(open_checkpoint(path)) for path in (tmp_path / name, expected)))
    run("--checkpoint", folder, "--base", language, "--to", "llava", "--output", tmp_path / "same")
    assert_same_tensors(*(tensors_of(open_checkpoint(path)) for path in (tmp_path / "same", folder)))

    language.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="holds a lora without its language model") as caught:
        run("--checkpoint", folder, "--to", "merged", "--output", tmp_path / "x")
    assert "--base" in caught.value.do
    run("--checkpoint", folder, "--base", tmp_path / "moved", "--to", "merged", "--output", tmp_path / "x")


def test_a_tower_that_is_not_here(tmp_path: Path, llava: Path) -> None:
    """LLaVA-1.5's checkpoints have no tower: config.json names it."""
    held = {n: t for n, t in load_file(llava / "model.safetensors").items() if "vision_tower" not in n}
    save_file(held, llava / "model.safetensors", metadata={"format": "pt"})
    tower = tmp_path / "tower"
    run("--checkpoint", llava, "--to", "merged", "--output", tmp_path / "a")
    tower.rename(tmp_path / "moved")
    nameless = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(nameless | {"mm_vision_tower": ""}))
    with pytest.raises(CheckpointError, match="no tower is named, and its weights are not in the checkpoint"):
        run("--checkpoint", llava, "--to", "merged", "--output", tmp_path / "b")
    (llava / "config.json").write_text(json.dumps(nameless))
    with pytest.raises(CheckpointError, match="is not here, and its weights are not in the checkpoint"):
        run("--checkpoint", llava, "--to", "merged", "--output", tmp_path / "b")
    run("--checkpoint", llava, "--to", "merged", "--output", tmp_path / "b", "--vision", tmp_path / "moved")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["mm_vision_tower"] == str(tmp_path / "moved")


def test_an_average_has_the_settings_of_the_last(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        folder = tmp_path / str(number)
        folder.mkdir()
        generator = torch.Generator().manual_seed(number)
        held = {f"t{i}": torch.randn(9, 5, generator=generator).to(dtype) for i in range(3)}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"number": number}))
        (folder / "tokenizer.json").write_text(str(number))
    first, second = tmp_path / "0", tmp_path / "1"
    run("--average", f"{first}:0.3", f"{second}:0.7", "--output", tmp_path / "out", "--shard_size", "0.0001MB")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"number": 1}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "1"
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    got: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("model-*.safetensors")):
        got |= load_file(file)
    assert_same_tensors(got, {name: (a[name].float() * 0.3 + b[name].float() * 0.7).bfloat16() for name in a})


def test_what_is_there_is_never_written_over(tmp_path: Path, llava: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        run("--checkpoint", llava, "--to", "hf", "--output", kept)
    assert [path.name for path in kept.iterdir()] == ["mine"]


def test_what_a_killed_export_left_is_removed_and_a_running_one_is_not(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", 0) as running:
        killed = tmp_path / ".tmp-out-0123456789ab"
        other = tmp_path / ".tmp-outer-0123456789ab"
        killed.mkdir()
        other.mkdir()
        with pytest.raises(KeyError), new_folder(tmp_path / "out", 0):
            assert not killed.exists() and running.exists() and other.exists()
            raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_an_export_is_whole_or_absent(tmp_path: Path, llava: Path) -> None:
    """A tensor that cannot be written, found after others were: nothing stays, not even an empty folder."""
    held = load_file(llava / "model.safetensors")
    held["model.norm.weight"] = torch.full_like(held["model.norm.weight"], 1e30)
    save_file(held, llava / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(WeightsError, match="more than float16 holds"):
        run("--checkpoint", llava, "--to", "merged", "--dtype", "fp16", "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_errors_are_told_in_words(tmp_path: Path, llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(llava), "--to", "merged", "--project", "imp", "--output", str(tmp_path / "out")]
    assert run_command(export.main, argv) == 2
    said = capsys.readouterr().err
    assert "error[usage]: imp has phi, phi3, no llama" in said and "leave --project imp out" in said
    (llava / "config.json").write_text((llava / "config.json").read_text().replace("spatial_unpad", "spatial"))
    argv = ["--checkpoint", str(llava), "--to", "llava-hf", "--output", str(tmp_path / "out")]
    assert run_command(export.main, argv) == 2
    assert "--to llava writes it in the format of its own project" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--output x", "nothing to export"),
        ("--run a --checkpoint b --output x", "--run and --checkpoint to export"),
        ("--run a", "nowhere to write"),
        ("--average a:1 --base b --output x", "--base with --average"),
        ("--run a --any_sum --output x", "--any_sum without --average"),
        ("--average a:0.5 b:0.6 --output x", "add up to 1.1"),
        ("--average a:0.5 b --output x", "--average has 'b'"),
        ("--average a:nan --output x", "--average has 'a:nan'"),
        ("--run a --output x --shard_size many", "shard_size is 'many'"),
        ("--run a --output x --to gguf", "expected one of"),
        ("--average a:${oc.env:HOME} --output x", "values are taken as they stand"),
    ],
)
def test_flags_that_do_not_fit(argv: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_export(argv.split())
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("--average a:1 --to hf --project imp --template bunny --tokenizer t --vision v", [
            f"--{name} has no effect with --average" for name in ("to", "project", "vision", "tokenizer", "template")
        ]),
        ("--average a:1 --dtype bf16 --shard_size 1GB", []),
        ("--run r --to hf --project bunny --template bunny", ["--project has no effect with --to hf", "--template"]),
        ("--checkpoint c --to merged --template vicuna_v1", ["--template has no effect with --to merged"]),
        ("--run r --to lavin --dtype bf16 --shard_size 1GB", ["--dtype has no effect with --to lavin", "--shard_size"]),
        ("--run r --to peft --shard_size 1GB --dtype bf16 --project imp", ["--shard_size has no effect with --to"]),
        ("--run r --to llava-hf --project imp", ["--project has no effect with --to llava-hf: a run has"]),
        ("--checkpoint c --to llava-hf --project imp --template bunny", ["--project has no effect with --to llava-hf"]),
        ("--checkpoint c --to llava-hf --project imp --vision v --tokenizer t --dtype fp16", []),
        ("--run r --to merged --project bunny --vision v --base b", []),
    ],
)  # fmt: skip
def test_a_flag_without_effect_warns(line: str, notes: list[str]) -> None:
    got = parse_export([*line.split(), "--output", "x"])[1]
    assert [text[: len(start)] for text, start in zip(got, notes, strict=True)] == notes


def test_warnings_are_printed(tmp_path: Path, llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--checkpoint", llava, "--to", "hf", "--template", "bunny", "--output", tmp_path / "out")
    assert "warning: --template has no effect with --to hf" in capsys.readouterr().err


def test_what_no_file_says_is_told(tmp_path: Path, llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The chat template is chosen by the model's numbers; so is the longest text, where config.json has none."""
    run("--checkpoint", llava, "--to", "llava-hf", "--output", tmp_path / "a")
    said = capsys.readouterr().out
    assert (
        "note       the chat template is vicuna_v1, chosen for llama with rope_theta 10000 and a tower of clip" in said
    )
    assert "max_position_embeddings" not in said
    run("--checkpoint", llava, "--to", "llava-hf", "--template", "vicuna_v1", "--output", tmp_path / "b")
    assert "chat template" not in capsys.readouterr().out
    config = json.loads((llava / "config.json").read_text())
    del config["max_position_embeddings"]
    (llava / "config.json").write_text(json.dumps(config))
    run("--checkpoint", llava, "--to", "hf", "--output", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["max_position_embeddings"] == 2048
    assert "note       max_position_embeddings is 2048, which no file says" in capsys.readouterr().out


def test_a_lora_is_no_model_to_average(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a LoRA") as caught:
        run("--average", f"{tmp_path}:1", "--output", tmp_path / "out")
    assert "--base BASE --to merged" in caught.value.do


def test_an_average_is_parsed() -> None:
    config, _ = parse_export(["--average", "runs/a:0.3", "C:/b:0.7", "--output", "x", "--no-any_sum"])
    assert parse_average(config) == [("runs/a", 0.3), ("C:/b", 0.7)]
    assert check_export(ExportConfig(average=["a:1.5", "b:-1"], any_sum=True, output="x")).any_sum


def test_help_needs_no_torch() -> None:
    script = "import sys, export\ntry: export.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False" and "--shard_size" in done.stdout
