"""train.py and chat.py in process on files as their users have them: a tiny Phi, a tiny SigLIP, parts of LLaVA's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from engine.architecture import model_of, record
from engine.build import build_model
from engine.checkpoint import find_latest, load_checkpoint
from engine.config import Config
from engine.config_file import from_yaml
from engine.errors import CheckpointError, UsageError
from engine.flags import parse_chat, parse_train
from engine.loading.cache import cache_of
from engine.plan.make import plan_without_weights
from engine.plan.shapes import shapes
from engine.run import train
from engine.sources import open_sources
from engine.trained import open_trained
from kernels.nf4 import quantize_nf4
from kernels.nf4_bitsandbytes import to_serialized
from models.adapters.lora import LoRAConfig
from models.language.phi import PhiConfig
from models.vlm import VisionLanguageModel
from models.weights.lora_files import write_peft
from tests.engine.tiny_folders import DIM, WIDTH, make_home
from tests.world import make_base, make_tokenizer

CPU = torch.device("cpu")
LORA = ["--train.language", "lora", "--lora.rank", "4", "--lora.alpha", "8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


def flags_of(home: Path, run: Path, *more: str, tower: str = "siglip") -> list[str]:
    return [
        "--data", str(home / "rows.json"), "--image_folder", str(home), "--model.language", str(home / "phi"),
        "--model.vision", str(home / tower), "--optim.batch_size", "4", "--optim.epochs", "2", "--optim.lr", "0.01",
        "--optim.warmup_epochs", "0", "--bits", "16bit", "--dataset.max_seq_len", "160", "--output_dir", str(run),
        "--log.every", "1", *more,
    ]  # fmt: skip


def run_train(argv: list[str], max_steps: int | None = None) -> Config:
    config, notes = parse_train(argv)
    assert train(config, argv, notes, max_steps=max_steps) == 0
    return config


def trained_tensors(run: Path) -> dict[str, Any]:
    step = find_latest(run)
    assert step is not None
    return load_checkpoint(step, only=["model"])[0]


def test_lora_on_phi_with_siglip_learns_resumes_and_answers(home: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_train(flags_of(home, whole, *LORA, "--bits", "4bit"))
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    tensors = trained_tensors(whole)
    kinds = {name.split(".", 3)[3] if name.startswith("language") else name for name in tensors}
    linears = {"attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"}
    lora = {f"{linear}.lora.{side}" for linear in linears for side in "ab"}
    assert kinds == lora | {f"projector.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}

    run_train(flags_of(home, parts, *LORA, "--bits", "4bit"), max_steps=3)
    run_train(flags_of(home, parts, *LORA, "--bits", "4bit", "--resume", "auto"))
    resumed = trained_tensors(parts)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())

    config = from_yaml(whole / "config.yaml")
    assert (config.model.projector, config.model.select_layer, config.model.select_feature) == (
        "mlp2x_gelu",
        -2,
        "patch",
    )
    assert (config.lora.rank, config.lora.alpha, config.train.vision) == (4, 8.0, "frozen")
    opened = open_trained(config, whole)
    assert opened.model.modality_embedding is None and opened.model.config.tokens_per_tile == 9
    assert all(torch.equal(p.detach(), tensors[name]) for name, p in opened.model.trainable().items())


def test_chat_on_a_lora_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from engine.chat import chat

    run_train(flags_of(home, tmp_path / "run", *LORA), max_steps=1)
    capsys.readouterr()
    asked = ["--run", str(tmp_path / "run"), "--image", str(home / "red.png"), "--question", "What is shown?"]
    assert chat(parse_chat([*asked, "--max_new_tokens", "6", "--temperature", "0"])) == 0
    assert capsys.readouterr().out.strip()


def test_tiles_put_together_from_scratch_learn_a_newline(home: Path, tmp_path: Path) -> None:
    """LLaVA-NeXT's way with pictures, without a checkpoint that says so."""
    tiles = ["--dataset.image_aspect_ratio", "anyres", "--model.patch_merge", "spatial_unpad"]
    config = run_train(flags_of(home, tmp_path / "run", *LORA, *tiles), max_steps=1)
    learned = trained_tensors(tmp_path / "run")["image_newline"]
    fresh = build_model(config, open_sources(config), device=CPU, dtype=torch.float32).image_newline
    assert fresh is not None and 0 < (fresh - learned).abs().max() < 0.1
    opened = open_trained(from_yaml(tmp_path / "run" / "config.yaml"), tmp_path / "run").model.image_newline
    assert opened is not None and torch.equal(opened, learned)


def test_what_is_said_of_tiles_has_no_effect_without_them(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for flags, notes in (
        (["--model.patch_merge", "spatial", "--dataset.anyres_grids", "2x2"],
         ["--model.patch_merge spatial has no effect", "--dataset.anyres_grids 2x2 has no effect"]),
        (["--model.patch_merge", "spatial", "--dataset.image_aspect_ratio", "anyres"], []),
        (["--model.patch_merge", "flat"], []),
    ):  # fmt: skip
        caplog.clear()
        config, _ = parse_train(flags_of(home, tmp_path, *LORA, *flags))
        record(config, open_sources(config))
        assert [message.partition(" without")[0] for message in caplog.messages] == notes


@pytest.mark.parametrize(
    ("tower", "more", "projector", "tokens"),
    [
        ("clip", (), "lavin", 6),
        ("clip", ("--train.language", "lora"), "mlp2x_gelu", 9),
        ("clip", ("--train.language", "frozen", "--train.vision", "frozen"), "mlp2x_gelu", 9),
        ("clip", ("--train.language", "lora", "--train.vision", "mma"), "lavin", 6),
        ("clip", ("--model.select_layer", "-3"), "mlp2x_gelu", 9),
        ("clip", ("--model.select_feature", "cls_patch"), "mlp2x_gelu", 10),
        ("siglip", (), "mlp2x_gelu", 9),
        ("siglip", ("--model.projector", "linear"), "linear", 9),
    ],
)
def test_what_auto_comes_to(
    home: Path, tmp_path: Path, tower: str, more: tuple[str, ...], projector: str, tokens: int
) -> None:
    config, _ = parse_train(flags_of(home, tmp_path, *more, tower=tower))
    sources = open_sources(config)
    shape = model_of(config, sources)
    assert (shape.projector.kind, shape.tokens_per_tile) == (projector, tokens)
    assert isinstance(shape.language, PhiConfig) and shape.language.residual_dropout == 0.1


def test_a_run_starts_from_a_projector_and_a_lora(home: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    config, _ = parse_train(flags_of(home, tmp_path, *LORA))
    shape = open_sources(config).language.config
    lora = LoRAConfig(rank=2, alpha=6.0, targets=("attention.q", "mlp.down"))
    sizes = {"attention.q": (DIM, DIM), "mlp.down": (48, DIM)}
    update = {
        f"layers.{i}.{name}.lora.{side}": torch.randn(size, generator=generator)
        for i in range(2)
        for name, (inside, outside) in sizes.items()
        for side, size in (("a", (2, inside)), ("b", (outside, 2)))
    }
    write_peft(tmp_path / "lora", update, shape, lora)
    weights = {
        f"layers.{i}.{leaf}": torch.randn(size, generator=generator)
        for i, inside in enumerate((WIDTH, DIM))
        for leaf, size in (("weight", (DIM, inside)), ("bias", (DIM,)))
    }
    named = {n.replace("layers.1", "2").replace("layers.0", "0"): tensor for n, tensor in weights.items()}
    torch.save({f"model.mm_projector.{n}": t for n, t in named.items()}, tmp_path / "mm_projector.bin")
    start = ["--adapter.init", str(tmp_path / "lora"), "--model.projector_weights", str(tmp_path / "mm_projector.bin")]
    run_train(flags_of(home, tmp_path / "run", "--train.language", "lora", *start,
                       "--optim.lr", "1e-30"), max_steps=1)  # fmt: skip
    recorded = from_yaml(tmp_path / "run" / "config.yaml").lora
    assert (recorded.rank, recorded.alpha, recorded.targets) == (2, 6.0, "attention.q,mlp.down")
    tensors = trained_tensors(tmp_path / "run")
    expected = {f"language.{n}": t for n, t in update.items()} | {f"projector.{n}": t for n, t in weights.items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())

    with pytest.raises(CheckpointError, match="is a LoRA without a projector"):
        open_trained(
            parse_train(flags_of(home, tmp_path, *start[:2], "--train.language", "lora"))[0], tmp_path / "lora"
        )
    shutil.copy(tmp_path / "mm_projector.bin", tmp_path / "lora" / "non_lora_trainables.bin")  # as LLaVA leaves it
    said = {"model_type": "phi", "mm_vision_tower": str(home / "siglip"), "mm_projector_type": "mlp2x_gelu"}
    (tmp_path / "lora" / "config.json").write_text(json.dumps(said | {"mm_vision_select_layer": -3}))
    beside = parse_train(flags_of(home, tmp_path, "--train.language", "lora", *start[:2], "--model.vision", ""))[0]
    sources = open_sources(beside)
    assert sources.vision.config.select_layer == -3 and sources.files[-1].name == "non_lora_trainables.bin"
    assert all(torch.equal(sources.projector.tensors[name], tensor) for name, tensor in weights.items())

    with pytest.raises(UsageError, match="6 / 2 B A, this command says 16 / 2"):
        run_train(flags_of(home, tmp_path / "other", "--train.language", "lora", *start, "--lora.alpha", "16"))
    with pytest.raises(UsageError, match=r"is a LoRA, and the language model trains mma"):
        run_train(flags_of(home, tmp_path / "other", *start))
    with pytest.raises(UsageError, match=r"model\.projector is linear.* of kind mlp2x_gelu"):
        open_sources(parse_train(flags_of(home, tmp_path, *start, "--model.projector", "linear"))[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.projector", "lavin"), "lavin with a siglip tower"),
        (("--model.projector", "identity"), "width 24 and a language model of width 32"),
        (("--adapter.language", "block"), "block with a phi model"),
        (("--train.language", "lora", "--lora.targets", "q_proj,qkv_proj"), "qkv_proj.*dense, fc1, fc2"),
        (("--train.language", "full", "--bits_head", "4bit"), "full with bits_head 4bit"),
    ],
)
def test_what_does_not_go_together(home: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config, _ = parse_train(flags_of(home, tmp_path, *more))
        sources = open_sources(config)
        model_of(config, sources)
    assert re.search(message, str(caught.value), re.DOTALL)


def llava_folder(home: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A Bunny-Phi of home's models: -3 layers of the tower, a projector. Returns the projector by its names on disk."""
    shutil.copytree(home / "phi", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "bunny-phi", "mm_vision_tower": str(home / "siglip"), "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -3, "mm_hidden_size": WIDTH,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(2)
    sizes = {"0.weight": (DIM, WIDTH), "0.bias": (DIM,), "2.weight": (DIM, DIM), "2.bias": (DIM,)}
    projector = {f"model.mm_projector.{n}": torch.randn(size, generator=generator) for n, size in sizes.items()}
    save_file(load_file(folder / "model.safetensors") | projector, folder / "model.safetensors", {"format": "pt"})
    return projector


def test_a_vision_language_checkpoint_brings_tower_projector_and_settings(home: Path, tmp_path: Path) -> None:
    projector = llava_folder(home, tmp_path / "bunny")
    flags = flags_of(home, tmp_path / "run", *LORA, "--model.language", str(tmp_path / "bunny"), "--model.vision", "")
    config = run_train([*flags, "--optim.lr", "1e-30"], max_steps=1)
    assert (config.model.projector, config.model.select_layer) == ("mlp2x_gelu", -3)
    tensors = trained_tensors(tmp_path / "run")
    for theirs, ours in (("0.weight", "layers.0.weight"), ("2.bias", "layers.1.bias")):
        assert torch.equal(tensors[f"projector.{ours}"], projector[f"model.mm_projector.{theirs}"])
    opened = open_trained(from_yaml(tmp_path / "run" / "config.yaml"), tmp_path / "run")
    assert len(opened.model.vision.blocks()) == 1  # of three: what block 1 gives is layer -3

    quantized = [*flags, "--bits", "4bit"]
    first, second = (
        cache_key(parse_train(line)[0]) for line in (quantized, [*quantized, "--model.select_layer", "-2"])
    )
    assert first != second


def cache_key(config: Config) -> Any:
    sources = open_sources(config)
    cache = cache_of(config, sources.language, sources.vision, torch.float32)
    assert cache is not None
    return cache.key


def test_the_cache_of_quantized_weights_gives_the_same_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / "cache"))
    config, _ = parse_train(flags_of(home, tmp_path, *LORA, "--bits", "4bit"))
    models = [build_model(config, open_sources(config), device=CPU, dtype=torch.float32) for _ in range(2)]
    assert "quantized weights come from" in capsys.readouterr().err
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_are_quantized_in_their_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' NF4, as transformers saves it: read from its files, from the cache, and quantized here."""
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "phi-4bit"
    shutil.copytree(home / "phi", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".layers." in n and n.endswith(".weight") and tensors[n].ndim == 2]:
        tensors |= to_serialized(quantize_nf4(tensors[name], name), name)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    named = ["--model.language", str(folder)]
    for more, message in (
        (["--train.language", "full"], "train.language full with weights of 4bit"),
        ([], "bits is 16bit, .* quantized to 4bit"), (["--bits", "8bit"], "bits is 8bit"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            open_sources(parse_train(flags_of(home, tmp_path, *named, *more))[0])
    models = []
    for where in (named, named, []):
        config, _ = parse_train(flags_of(home, tmp_path, *LORA, *where, "--bits", "4bit"))
        models.append(build_model(config, open_sources(config), device=CPU, dtype=torch.float32).state_dict())
    assert len(list((tmp_path / "cache" / "weights").glob("*/weights.safetensors"))) == 2
    for other in models[1:]:
        assert all(torch.equal(models[0][name], tensor) for name, tensor in other.items())


def test_a_lora_is_no_language_model(home: Path, tmp_path: Path) -> None:
    config, _ = parse_train(flags_of(home, tmp_path))
    lora = LoRAConfig(rank=1, targets=("attention.q",))
    update = {f"layers.{i}.attention.q.lora.{side}": torch.zeros(size) for i in range(2)
              for side, size in (("a", (1, DIM)), ("b", (DIM, 1)))}  # fmt: skip
    write_peft(tmp_path / "lora", update, open_sources(config).language.config, lora)
    config.model.language = str(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="holds a lora, and no language model"):
        open_sources(config)


def test_what_is_exported_is_trained_planned_and_talked_to(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LLaMA with nothing but a tokenizer.model, whose vocabulary --to llava-hf fills up for <image>."""
    from engine.chat import chat

    base, first = tmp_path / "base", tmp_path / "first"
    base.mkdir()
    pieces = make_tokenizer(base / "tokenizer.model")
    make_base(base, base / "tokenizer.model")
    tower = ["--model.vision", str(home / "siglip")]
    run_train(flags_of(home, first, *LORA, "--model.language", str(base)), max_steps=1)
    for to, vision, rows in (("llava-hf", [], 384), ("hf", tower, pieces)):
        out, run = tmp_path / to, tmp_path / f"{to}-run"
        assert export.main(["--run", str(first), "--to", to, "--output", str(out)]) == 0
        assert not (out / "tokenizer.json").exists() and (out / "tokenizer.model").is_file()
        flags = [*flags_of(home, run, *LORA), "--model.language", str(out), "--model.vision", *(vision[1:] or [""])]
        plan = plan_without_weights(parse_train([*flags, "--plan"])[0], 1)
        planned = shapes(parse_train(flags)[0])
        run_train(flags, max_steps=1)
        opened = open_trained(from_yaml(run / "config.yaml"), run)
        assert opened.model.config == planned.model and planned.model.language.vocab_size == rows
        assert sum(plan.parameters.values()) == sum(p.numel() for p in VisionLanguageModel(planned.model).parameters())
        found = [opened.tokenizer.id_of(token) for token in ("<pad>", "<image>")]
        assert found == ([pieces, pieces + 1] if to == "llava-hf" else [None, None])
        capsys.readouterr()
        asked = ["--run", str(run), "--image", str(home / "red.png"), "--question", "What is shown?"]
        assert chat(parse_chat([*asked, "--max_new_tokens", "6", "--temperature", "0"])) == 0


def test_a_plan_counts_what_a_run_trains(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector and a LoRA folder, with its settings, to start from; and no LoRA that nobody named."""
    generator = torch.Generator().manual_seed(3)
    torch.save(
        {f"mm_projector.{leaf}": torch.randn(size, generator=generator)
         for leaf, size in (("weight", (DIM, WIDTH)), ("bias", (DIM,)))}, tmp_path / "mm_projector.bin",
    )  # fmt: skip
    lora = LoRAConfig(rank=2, alpha=6.0, targets=("attention.q",))
    update = {f"layers.{i}.attention.q.lora.{side}": torch.zeros(size) for i in range(2)
              for side, size in (("a", (2, DIM)), ("b", (DIM, 2)))}  # fmt: skip
    shape = open_sources(parse_train(flags_of(home, tmp_path, *LORA))[0]).language.config
    write_peft(tmp_path / "lora", update, shape, lora)
    shutil.copy(tmp_path / "mm_projector.bin", tmp_path / "lora" / "non_lora_trainables.bin")
    said = {"model_type": "phi", "mm_vision_tower": str(home / "clip"), "mm_projector_type": "linear",
            "mm_vision_select_layer": -3, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial",
            "tokenizer_model_max_length": 777}  # fmt: skip
    (tmp_path / "lora" / "config.json").write_text(json.dumps(said))
    monkeypatch.chdir(tmp_path / "lora")
    start = ["--adapter.init", str(tmp_path / "lora"), "--train.language", "lora"]
    no_flags = ["--model.vision", "", "--dataset.max_seq_len", "None"]
    for more, kind, rank, layer in (
        (["--model.projector_weights", str(tmp_path / "mm_projector.bin"), *LORA], "linear", 4, -2),
        ([*start, *no_flags], "linear", 2, -3),
        (["--train.language", "lora"], "mlp2x_gelu", 64, -2),
    ):  # fmt: skip
        flags = flags_of(home, tmp_path / "run", *more)
        planned, (config, _) = shapes(parse_train(flags)[0]), parse_train(flags)
        sources = open_sources(config)
        assert planned.model == record(config, sources)
        assert planned.weight_bytes == sum(file.stat().st_size for file in sources.files)
        found = planned.model.projector.kind, planned.model.lora.rank, planned.model.vision.select_layer
        assert found == (kind, rank, layer)
        for part in (planned.config.model, planned.config.dataset):
            assert part in (config.model, config.dataset)
    assert (
        config.dataset.max_seq_len == 160
        and shapes(parse_train(flags_of(home, tmp_path, *start, *no_flags))[0]).config.dataset.max_seq_len == 777
    )


def test_a_checkpoints_tower_is_not_chosen_anew(home: Path, tmp_path: Path) -> None:
    """Neither by a run nor by its plan."""
    llava_folder(home, tmp_path / "bunny")
    file = tmp_path / "bunny" / "model.safetensors"
    tower = load_file(home / "siglip" / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    save_file(load_file(file) | inside, file, {"format": "pt"})
    config_file = tmp_path / "bunny" / "config.json"
    settings = json.loads(config_file.read_text()) | {"unfreeze_vision_tower": True}
    settings["vision_config"] = json.loads((home / "siglip" / "config.json").read_text())
    config_file.write_text(json.dumps(settings))
    flags = flags_of(home, tmp_path, *LORA, "--model.language", str(tmp_path / "bunny"), "--model.vision", "")
    config = parse_train(flags)[0]
    assert record(config, open_sources(config)) == shapes(parse_train(flags)[0]).model
    for opener in (open_sources, shapes):
        with pytest.raises(UsageError, match="tower was trained with -3"):
            opener(parse_train([*flags, "--model.select_layer", "-2"])[0])


def test_settings_that_name_no_tower(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not looked for in the current directory."""
    llava_folder(home, tmp_path / "bunny")
    config_file = tmp_path / "bunny" / "config.json"
    config_file.write_text(config_file.read_text().replace(str(home / "siglip"), ""))
    flags = flags_of(home, tmp_path, *LORA, "--model.language", str(tmp_path / "bunny"))
    monkeypatch.chdir(home / "siglip")
    for opener in (open_sources, shapes):
        with pytest.raises(CheckpointError, match="and the checkpoint names none") as caught:
            opener(parse_train([*flags, "--model.vision", ""])[0])
        assert "--model.vision" in caught.value.do
        opener(parse_train(flags)[0])
