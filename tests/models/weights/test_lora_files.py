"""LoRA from PEFT's files and back, against peft itself and tiny models of transformers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import as_nibble_error
from models.adapters.lora import LoRAConfig
from models.language.config import DecoderConfig
from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig
from models.weights.errors import WeightsError
from models.weights.families.registry import family_of
from models.weights.lora_files import TowerLoRAError, peft_names, read_peft, read_peft_tower, write_peft
from models.weights.settings import Settings

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LAYERS, DIM, HEADS, RANK = 2, 16, 4, 3
HEAD_DIM = DIM // HEADS
SHAPE = {
    "hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS,
    "intermediate_size": 20, "vocab_size": 23, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}
MODELS = {
    "llama": ("Llama", GROUPED, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "phi": ("Phi", SHAPE, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    "phi3": ("Phi3", SHAPE, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "stablelm": ("StableLm", SHAPE, ["q_proj", "v_proj"]),
}
OURS = {
    "q_proj": "attention.q", "k_proj": "attention.k", "v_proj": "attention.v", "o_proj": "attention.o",
    "dense": "attention.o", "qkv_proj": "attention.qkv", "gate_proj": "mlp.gate", "up_proj": "mlp.up",
    "down_proj": "mlp.down", "gate_up_proj": "mlp.gate_up", "fc1": "mlp.up", "fc2": "mlp.down",
}  # fmt: skip


def base_model(family: str) -> Any:
    kind, shape, _ = MODELS[family]
    extra = {"use_qkv_bias": True, "partial_rotary_factor": 0.5} if family == "stablelm" else {}
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape, **extra))


def decoder_config(base: Any) -> DecoderConfig:
    settings = Settings(Path("config.json"), base.config.to_dict())
    return family_of(settings).config_of(settings)


def adapted(base: Any, targets: list[str] | str, **settings: Any) -> Any:
    """`base` with a LoRA whose B is not zero any more."""
    settings = {"r": RANK, "lora_alpha": 6, "lora_dropout": 0.25, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def expected(model: Any) -> dict[str, Tensor]:
    """Our names, from the modules that peft put in."""
    out = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or "layers." not in name:
            continue
        index, rest = name.rpartition("layers.")[2].split(".", 1)
        linear = f"layers.{index}.{OURS[rest.rpartition('.')[2]]}"
        out[f"{linear}.lora.a"] = module.lora_A["default"].weight.detach()
        out[f"{linear}.lora.b"] = module.lora_B["default"].weight.detach()
    return out


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def change_settings(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, DecoderConfig, dict[str, Tensor]]:
    """A LoRA on q and v of a LLaMA as a folder, the LLaMA's shape, and the tensors."""
    base = base_model("llama")
    config, model = decoder_config(base), adapted(base, ["q_proj", "v_proj"])
    model.save_pretrained(tmp_path)
    return tmp_path, config, expected(model)


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_of_peft_and_back(tmp_path: Path, family: str) -> None:
    base = base_model(family)
    config, model = decoder_config(base), adapted(base, MODELS[family][2])
    model.save_pretrained(tmp_path / "theirs")
    tensors, lora = read_peft(tmp_path / "theirs", config)
    assert same(tensors, expected(model))
    targets = tuple(OURS[target] for target in MODELS[family][2])
    assert replace(lora, targets=()) == LoRAConfig(rank=RANK, alpha=6.0, dropout=0.25)
    assert set(lora.targets) == set(targets)
    assert {ours: theirs.rpartition(".")[2] for ours, theirs in peft_names(config).items()}.items() >= {
        (OURS[target], target) for target in MODELS[family][2]
    }

    write_peft(tmp_path / "ours", tensors, config, lora, base="org/base")
    again, same_lora = read_peft(tmp_path / "ours", config)
    assert same(again, tensors) and same_lora == lora
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert same(ours, theirs)
    loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path / "ours")
    assert same(expected(loaded), expected(model))
    settings = loaded.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (RANK, 6, 0.25)
    assert (settings.task_type, settings.base_model_name_or_path) == ("CAUSAL_LM", "org/base")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["inference_mode"] is True


@pytest.mark.parametrize("spelling", ["bin", "default", "language_model", "4.52"])
def test_other_spellings(llama: tuple[Path, DecoderConfig, dict[str, Tensor]], spelling: str) -> None:
    """PEFT 0.4's pickle, `.default.`, and the language model within one of transformers' vision-language models."""
    folder, config, wanted = llama
    content = load_file(folder / "adapter_model.safetensors")
    if spelling == "default":
        content = {name.replace(".weight", ".default.weight"): tensor for name, tensor in content.items()}
    elif spelling == "language_model":
        content = {n.replace("base_model.model.", "base_model.model.language_model."): t for n, t in content.items()}
    elif spelling == "4.52":
        content = {n.replace("model.model.", "model.model.language_model."): t for n, t in content.items()}
    (folder / "adapter_model.safetensors").unlink()
    if spelling == "bin":
        torch.save(content, folder / "adapter_model.bin")
    else:
        save_file(content, folder / "adapter_model.safetensors")
    tensors, lora = read_peft(folder, config)
    assert same(tensors, wanted) and lora.targets == ("attention.q", "attention.v")


def test_a_base_in_metas_order_has_the_rows_of_b_moved(
    tmp_path: Path, llama: tuple[Path, DecoderConfig, dict[str, Tensor]]
) -> None:
    folder, config, theirs = llama
    tensors, lora = read_peft(folder, replace(config, rope_interleaved=True))
    for name, tensor in tensors.items():
        if not name.endswith("attention.q.lora.b"):
            assert torch.equal(tensor, theirs[name])
            continue
        for row in range(DIM):  # channel i of a half -> 2i, 2i + 1
            head, channel = divmod(row, HEAD_DIM)
            half, i = divmod(channel, HEAD_DIM // 2)
            assert torch.equal(tensor[head * HEAD_DIM + 2 * i + half], theirs[name][row])
    write_peft(tmp_path / "out", tensors, replace(config, rope_interleaved=True), lora)
    assert same(read_peft(tmp_path / "out", config)[0], theirs)


@pytest.mark.parametrize("layout", ["microsoft", "dev"])
def test_a_lora_on_phis_fused_layouts_is_one_a_and_three_bs(tmp_path: Path, layout: str) -> None:
    config = decoder_config(base_model("phi"))
    module = {"microsoft": "transformer.h.{}.mixer.Wqkv", "dev": "model.layers.{}.self_attn.query_key_value"}[layout]
    content = {}
    for i in range(LAYERS):
        content[f"base_model.model.{module.format(i)}.lora_A.weight"] = torch.randn(RANK, DIM)
        content[f"base_model.model.{module.format(i)}.lora_B.weight"] = torch.randn(3 * DIM, RANK)
    save_file(content, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": [module.rpartition(".")[2]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors, lora = read_peft(tmp_path, config)
    assert lora == LoRAConfig(rank=RANK, alpha=6.0, dropout=0.0, targets=("attention.q", "attention.k", "attention.v"))
    for i in range(LAYERS):
        a, b = (content[f"base_model.model.{module.format(i)}.lora_{side}.weight"] for side in "AB")
        rows = b.unflatten(0, (3, DIM) if layout == "microsoft" else (HEADS, 3, HEAD_DIM))
        for k, part in enumerate("qkv"):
            ours = rows[k] if layout == "microsoft" else rows[:, k].reshape(DIM, RANK)
            assert torch.equal(tensors[f"layers.{i}.attention.{part}.lora.a"], a)
            assert torch.equal(tensors[f"layers.{i}.attention.{part}.lora.b"], ours)


def test_rank_stabilised_scaling_is_another_alpha(llama: tuple[Path, DecoderConfig, dict[str, Tensor]]) -> None:
    folder, config, _ = llama
    change_settings(folder, use_rslora=True)
    lora = read_peft(folder, config)[1]
    assert lora.alpha / lora.rank == pytest.approx(6 / math.sqrt(RANK), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 2}, "got 3x16, expected 2x16"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a positive number"),
        ({"r": 1 << 14}, "LoRA takes ranks from 1 to"),
        ({"target_modules": ["q_proj", "o_proj", "v_proj"]}, r"missing \(2\): model\.layers\.0\.self_attn\.o_proj"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(
    llama: tuple[Path, DecoderConfig, dict[str, Tensor]], settings: dict[str, object], message: str
) -> None:
    folder, config, _ = llama
    change_settings(folder, **settings)
    with pytest.raises(WeightsError, match=message):
        read_peft(folder, config)


def test_every_difference_is_listed(llama: tuple[Path, DecoderConfig, dict[str, Tensor]]) -> None:
    folder, config, _ = llama
    path = folder / "adapter_model.safetensors"
    content, start = load_file(path), "model.layers.1.self_attn."
    del content[f"base_model.model.{start}q_proj.lora_B.weight"]
    content[f"base_model.model.{start}v_proj.lora_A.weight"] = torch.ones(RANK, 5)
    content["base_model.model.lm_head.lora_A.weight"] = torch.ones(2)
    save_file(content, path)
    with pytest.raises(WeightsError) as caught:
        read_peft(folder, config)
    assert caught.value.missing == [f"{start}q_proj.lora_B.weight"]
    assert caught.value.extra == ["lm_head.lora_A.weight"]
    assert caught.value.mismatched == [f"{start}v_proj.lora_A.weight: got 3x5, expected 3x{DIM}"]


def test_files_that_are_wrong(llama: tuple[Path, DecoderConfig, dict[str, Tensor]]) -> None:
    folder, config, _ = llama
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match="damaged"):
        read_peft(folder, config)
    path.unlink()
    with pytest.raises(WeightsError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        read_peft(folder, config)

    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("exit 1",)

    torch.save({"a": Program()}, folder / "adapter_model.bin")
    with pytest.raises(WeightsError, match="wants to import"):
        read_peft(folder, config)


def llava() -> Any:
    """A LLaVA of transformers, whose CLIP has linears with the language model's names."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED), image_token_index=22,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=28,
            patch_size=14,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config)


def test_a_lora_that_fell_on_the_tower_says_so(tmp_path: Path) -> None:
    base = llava()
    config = decoder_config(base_model("llama"))
    model = adapted(base, ["q_proj", "v_proj"])
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"changes the vision tower: 8 tensors of its LoRA.*\(pull request 1347\)"):
        read_peft(tmp_path, config)
    with pytest.raises(TowerLoRAError) as caught:
        read_peft(tmp_path, config)
    assert "or give --train.vision lora" in str(as_nibble_error(caught.value))  # the commands' word, said by them
    tensors, _ = read_peft(tmp_path, config, with_tower=True)
    assert same(tensors, expected(model.model.model.language_model))
    wanted = expected(model.model.model.vision_tower)
    tower = ClipConfig(
        width=8, num_layers=LAYERS, num_heads=2, patch_size=14, image_size=28, mlp_dim=12, select_feature="patch"
    )
    tensors, lora = read_peft_tower(tmp_path, tower)  # -2: the last block is not run
    assert same(tensors, {n: t for n, t in wanted.items() if n.startswith("layers.0.")})
    assert lora.targets == ("attention.q", "attention.v")
    assert same(read_peft_tower(tmp_path, replace(tower, select_layer=-1))[0], wanted)


def test_what_is_written_finds_no_linear_of_a_tower(tmp_path: Path) -> None:
    """LLaVA's and Bunny's classes keep the tower beside the language model's blocks, under names that end alike."""
    tree = nn.Module()
    tree.model = base_model("llama").model
    tree.model.vision_tower = nn.Module()
    tree.model.vision_tower.encoder = base_model("llama").model
    config = decoder_config(base_model("llama"))
    lora = LoRAConfig(rank=RANK, targets=("attention.q",))
    shapes = {"a": (RANK, DIM), "b": (DIM, RANK)}
    tensors = {f"layers.{i}.attention.q.lora.{side}": torch.randn(shapes[side]) for i in range(LAYERS) for side in "ab"}
    write_peft(tmp_path, tensors, config, lora)
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(tmp_path), tree)
    found = {name for name, module in tree.named_modules() if hasattr(module, "lora_A")}
    assert found == {f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)}


def test_only_the_lora_that_was_announced_is_written(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=23, dim=DIM, num_layers=1, num_heads=HEADS, num_kv_heads=2, ffn_dim=20, norm_eps=1e-5
    )
    tensors = {"layers.0.attention.q.lora.a": torch.ones(RANK, DIM), "layers.0.mlp.up.lora.a": torch.ones(RANK, DIM)}
    with pytest.raises(WeightsError) as caught:
        write_peft(tmp_path / "out", tensors, config, LoRAConfig(rank=RANK, targets=("attention.q",)))
    assert caught.value.missing == ["layers.0.attention.q.lora.b"]
    assert caught.value.extra == ["layers.0.mlp.up.lora.a"]
    assert not (tmp_path / "out").exists()
