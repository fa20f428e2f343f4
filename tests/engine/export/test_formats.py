"""--to hf, merged, llava and peft: what transformers, PEFT and our own reader make of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import UsageError
from engine.export.formats import Plan, plan_hf, plan_lavin, plan_llava, plan_merged, plan_peft
from engine.export.origin import MMATensors, Origin
from models.weights.checkpoint import open_checkpoint
from models.weights.language import open_language
from models.weights.rope_order import to_interleaved
from models.weights.write.llava import FormatError
from tests.engine.export.made_up import (
    ANYRES,
    GRID,
    VOCABULARY,
    assert_same_tensors,
    export_config,
    language_folder,
    origin_of,
    origin_tensors,
    random_lora,
    settings_of,
    tensors_of,
    tower_folder,
    transformers,
)  # fmt: skip

IDS = torch.tensor([[1, 5, 6, 7, 8, 30, 60]])


def written(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    plan.write(folder)
    return folder


def made(
    folder: Path, family: str, tower: str, *, head_bias: bool = False, settings: Any = None, **parts: Any
) -> Origin:
    language = language_folder(folder / "language", family, head_bias=head_bias)
    tower_path = tower_folder(folder / "tower", tower)
    return origin_of(language, tower_path, settings_of(tower_path, **(settings or {})), **parts)


def logits(folder: Path) -> Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "stablelm"])
def test_hf_is_the_language_model(tmp_path: Path, family: str) -> None:
    origin = made(tmp_path, family, "clip", head_bias=True)
    output = written(plan_hf(origin, export_config(tmp_path / "out")), tmp_path / "out")
    assert torch.equal(logits(output), logits(tmp_path / "language"))
    back = open_checkpoint(output)
    assert back.kind == "language"
    expected = {n: t for n, t in origin_tensors(origin).items() if n.startswith("language.")}
    assert_same_tensors(tensors_of(back), expected)
    config = json.loads((output / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["torch_dtype"] == "float32"
    assert transformers.AutoTokenizer.from_pretrained(output)("w0 w1").input_ids == [1, 3, 4]


def test_bunnys_phi_gets_the_bias_that_transformers_wants(tmp_path: Path) -> None:
    origin = made(tmp_path, "phi", "clip")
    assert not origin.language.config.head_bias
    output = written(plan_hf(origin, export_config(tmp_path / "out")), tmp_path / "out")
    bias = tensors_of(open_checkpoint(output))["language.head.bias"]
    assert torch.equal(bias, torch.zeros(VOCABULARY))
    with_bias = made(tmp_path / "with", "phi", "clip", head_bias=True).language.fetch("head.bias")
    assert isinstance(with_bias, Tensor) and with_bias.abs().max() > 0.01
    expected = logits(tmp_path / "with" / "language") - with_bias
    torch.testing.assert_close(logits(output), expected, rtol=1e-6, atol=1e-6)


def test_metas_order_of_q_and_k_is_put_back(tmp_path: Path) -> None:
    """A LLaMA that came from Meta's files, whose q and k are interleaved."""
    origin = made(tmp_path, "llama", "clip")
    language = origin.language
    fetch = language.fetch
    interleaved = dataclasses.replace(language.config, rope_interleaved=True)

    def of_meta(name: str) -> Any:
        tensor = fetch(name)
        assert isinstance(tensor, Tensor)
        turns = name.endswith(("attention.q.weight", "attention.k.weight"))
        return to_interleaved(tensor, interleaved.head_dim) if turns else tensor

    meta = dataclasses.replace(origin, language=dataclasses.replace(language, config=interleaved, fetch=of_meta))
    output = written(plan_hf(meta, export_config(tmp_path / "out")), tmp_path / "out")
    assert torch.equal(logits(output), logits(tmp_path / "language"))


CASES = [  # family, tower, bias in the head, settings, model_type
    ("llama", "clip", False, ANYRES, "llava_llama"),
    ("llama", "clip", False, {"merge": "spatial", "aspect_ratio": "anyres", "grid_pinpoints": GRID}, "llava_llama"),
    ("llama", "siglip", False, {"aspect_ratio": "pad"}, "bunny-llama"),
    ("llama", "eva", False, {}, "bunny-llama"),
    ("phi", "siglip", False, {"aspect_ratio": "pad"}, "bunny-phi"),
    ("phi", "siglip", True, {}, "imp"),
    ("phi3", "eva", False, {"tower_trained": True}, "bunny-phi3"),
    ("phi3", "siglip", False, {"projector": "mlp2x_gelu"}, "bunny-phi3"),
    ("stablelm", "clip", False, {"tower_trained": True}, "bunny-stablelm"),
    ("phi", "clip", True, {"select_feature": "cls_patch"}, "imp"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tower", "head_bias", "settings", "model_type"), CASES)
def test_a_whole_model_comes_back_bit_for_bit(
    tmp_path: Path, family: str, tower: str, head_bias: bool, settings: dict[str, Any], model_type: str
) -> None:
    """As LLaVA, Bunny and Imp write it, in shards, with the blocks and norms of the tower that are not run."""
    origin = made(tmp_path, family, tower, head_bias=head_bias, settings=settings)
    config = export_config(tmp_path / "out", shard_size="0.02MB")
    output = written(plan_merged(origin, config), tmp_path / "out")
    assert len(list(output.glob("model-*.safetensors"))) > 2
    assert json.loads((output / "config.json").read_text())["model_type"] == model_type
    back = open_checkpoint(output)
    assert back.kind == "vlm"
    assert_same_tensors(tensors_of(back), origin_tensors(origin))
    assert back.settings == settings_of(
        tmp_path / "tower" if tower != "eva" else tmp_path / "tower" / "eva.pt", **settings
    )
    assert back.vision is not None and origin.vision is not None
    unused = [dict(source.unused()) for source in (back.vision, origin.vision)]
    assert_same_tensors(*unused)
    assert unused[0]


def test_the_keys_are_those_of_each_project(tmp_path: Path) -> None:
    llava = made(tmp_path / "a", "llama", "clip", settings=ANYRES | {"tower_trained": True})
    config = _config(plan_merged(llava, export_config(tmp_path / "x")), tmp_path / "x")
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["unfreeze_mm_vision_tower"] is True
    assert config["image_grid_pinpoints"] == [list(size) for size in GRID]  # (width, height)
    assert config["mm_patch_merge_type"] == "spatial_unpad" and config["mm_vision_select_layer"] == -2
    assert config["tokenizer_model_max_length"] == 128 and "use_s2" not in config
    bunny = made(tmp_path / "b", "stablelm", "siglip", settings={"tower_trained": True})
    config = _config(plan_merged(bunny, export_config(tmp_path / "y")), tmp_path / "y")
    assert config["architectures"] == ["BunnyStableLMForCausalLM"] and config["unfreeze_vision_tower"] is True
    assert config["use_s2"] is False and "mm_patch_merge_type" not in config
    forced = _config(plan_merged(made(tmp_path / "c", "phi3", "siglip"), export_config(tmp_path / "z", project="imp")),
                     tmp_path / "z")  # fmt: skip
    assert forced["model_type"] == "imp_phi3" and forced["mm_vision_select_feature"] == "patch"


def _config(plan: Plan, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((written(plan, folder) / "config.json").read_text())
    return found


def test_a_project_that_cannot_say_it_is_an_error(tmp_path: Path) -> None:
    origin = made(tmp_path, "llama", "siglip", settings=ANYRES)
    with pytest.raises(FormatError, match="llava: has towers of clip, no siglip; bunny: has one tile an image"):
        plan_merged(origin, export_config(tmp_path / "out"))
    with pytest.raises(FormatError, match="imp has phi, phi3, no llama"):
        plan_merged(origin, export_config(tmp_path / "out", project="imp"))


def test_a_projector_alone(tmp_path: Path) -> None:
    origin = made(tmp_path, "llama", "clip", settings=ANYRES, stage="projector")
    output = written(plan_llava(origin, export_config(tmp_path / "out")), tmp_path / "out")
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "mm_projector.bin"]
    held = torch.load(output / "mm_projector.bin", weights_only=True)
    assert sorted(held) == ["model.image_newline", *(f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in
                            ("bias", "weight"))]  # fmt: skip
    back = open_checkpoint(output)
    assert back.kind == "projector" and back.settings is not None and back.settings.merge == "spatial_unpad"
    expected = {n: t for n, t in origin_tensors(origin).items() if not n.startswith(("language.", "vision."))}
    assert_same_tensors(tensors_of(back), expected)
    assert json.loads((output / "config.json").read_text())["tune_mm_mlp_adapter"] is True


TARGETS = {"llama": ("attention.q", "attention.v", "mlp.down"), "phi": ("attention.k", "mlp.up"),
           "phi3": ("attention.qkv", "mlp.gate_up"), "stablelm": ("attention.o", "mlp.gate")}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "stablelm"])
def test_a_lora_is_what_peft_reads_and_merges_to_the_same_logits(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    origin = made(tmp_path, family, "clip", head_bias=True, stage="lora")
    object.__setattr__(origin, "language_lora", lora := random_lora(origin, TARGETS[family]))
    output = written(plan_llava(origin, export_config(tmp_path / "out")), tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"} <= {
        path.name for path in output.iterdir()
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language", attn_implementation="eager")
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, output).eval()(IDS).logits
    merged = written(plan_hf(origin, export_config(tmp_path / "hf")), tmp_path / "hf")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert (logits(tmp_path / "language") - expected).abs().max() > 0.1  # the adapter does something

    back = open_checkpoint(output)
    assert back.kind == "lora" and back.lora_config is not None
    assert (back.lora_config.rank, back.lora_config.alpha) == (3, 7.0)
    wanted = {f"lora.{n}": t for n, t in lora.tensors.items()} | {
        f"projector.{n}": t for n, t in origin.projector.items()
    }
    assert_same_tensors(tensors_of(back), wanted)
    held = torch.load(output / "non_lora_trainables.bin", weights_only=True)
    assert "base_model.model.model.mm_projector.0.weight" in held


def test_a_tower_that_was_trained_beside_a_lora_comes_back(tmp_path: Path) -> None:
    """As its files have it, whatever the base's type is: its shape is none that was published."""
    origin = made(tmp_path, "stablelm", "siglip", stage="lora", settings={"tower_trained": True})
    object.__setattr__(origin, "language_lora", random_lora(origin, ("attention.q",)))
    half = dataclasses.replace(origin.language, fetch=lambda name: _tensor(origin, name).half())
    mixed = dataclasses.replace(origin, language=half)
    output = written(plan_llava(mixed, export_config(tmp_path / "out")), tmp_path / "out")
    back, whole = open_checkpoint(output), origin_tensors(origin)
    got = {name: tensor for name, tensor in tensors_of(back).items() if not name.startswith("lora.")}
    assert_same_tensors(got, {n: t for n, t in whole.items() if not n.startswith("language.")})
    assert back.vision is not None and origin.vision is not None and back.vision.config == origin.vision.config


def _tensor(origin: Origin, name: str) -> Tensor:
    found = open_language(origin.language.files[0].parent).fetch(name)
    assert isinstance(found, Tensor)
    return found


def test_pickles_say_nothing_of_where_they_were_written(tmp_path: Path) -> None:
    origin = made(tmp_path, "llama", "clip", stage="projector")
    files = [
        written(plan_llava(origin, export_config(tmp_path / name)), tmp_path / name) / "mm_projector.bin"
        for name in "ab"
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"tmp" not in files[0].read_bytes()


def test_what_is_said_where_a_format_cannot_be(tmp_path: Path) -> None:
    origin = made(tmp_path, "llama", "clip")
    with pytest.raises(UsageError, match="has no LoRA"):
        plan_peft(origin, export_config(tmp_path / "out"))
    mma = MMATensors(tensors={"language.layers.0.attention_adapter.down.weight": torch.zeros(1)}, epoch=0, args={})
    object.__setattr__(origin, "mma", mma)
    for plan in (plan_hf, plan_merged, plan_llava, plan_peft):
        with pytest.raises(UsageError, match="MMA adapters in its language") as caught:
            plan(origin, export_config(tmp_path / "out"))
        assert "read the run itself" in caught.value.do  # LaVIN has neither patches nor this projector
    with pytest.raises(UsageError, match="LaVIN's format cannot say") as caught:
        plan_lavin(origin, export_config(tmp_path / "out"))
    assert "class tokens, not llama and clip's patch" in caught.value.why
    object.__setattr__(origin, "mma", None)
    object.__setattr__(origin, "settings", settings_of(tmp_path, projector="lavin"))
    with pytest.raises(UsageError, match="has a lavin projector of patch"):
        plan_merged(origin, export_config(tmp_path / "out"))


def test_a_base_that_is_quantized_is_not_written_as_if_it_were_not(tmp_path: Path) -> None:
    language = language_folder(tmp_path / "language", "llama")
    path = language / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in [name for name in held if name.endswith("_proj.weight")]:
        held[name] = torch.ones(held[name].shape, dtype=torch.int8)
        held[name.replace("weight", "SCB")] = torch.ones(held[name].shape[0])
    save_file(held, path, metadata={"format": "pt"})
    origin = origin_of(language, tower := tower_folder(tmp_path / "tower", "clip"), settings_of(tower))
    for plan in (plan_hf, plan_merged):
        with pytest.raises(UsageError, match="are quantized") as caught:
            plan(origin, export_config(tmp_path / "out"))
        assert "export from the 16-bit model" in caught.value.do
    object.__setattr__(origin, "stage", "projector")
    assert written(plan_llava(origin, export_config(tmp_path / "out")), tmp_path / "out")  # needs none of these weights


def test_sixteen_bits_where_they_are_asked_for(tmp_path: Path) -> None:
    origin = made(tmp_path, "llama", "clip")
    output = written(plan_merged(origin, export_config(tmp_path / "out", dtype="bf16")), tmp_path / "out")
    back = tensors_of(open_checkpoint(output))
    assert_same_tensors(back, {name: tensor.bfloat16() for name, tensor in origin_tensors(origin).items()})
    assert back["language.embed.weight"].shape[0] == VOCABULARY
