"""Phi, Phi-3 and StableLM as transformers and their authors wrote them: names, rows, numbers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.language.phi import PhiConfig
from models.language.phi3 import Phi3Config
from models.language.stablelm import StableLMConfig
from models.weights.checkpoint import open_checkpoint
from models.weights.errors import WeightsError
from models.weights.families.registry import FAMILIES, family_named
from models.weights.language import open_language

transformers = pytest.importorskip("transformers")

Tensors = dict[str, Tensor]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 24,
    "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NUMBERS = {"vocab_size": 24, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 48}
WIDE_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 2}  # 16 channels, so that a quarter of them is 4
SQUARE = torch.ones(32, 32)
CLASSES = {"phi": "Phi", "phi3": "Phi3", "stablelm": "StableLm", "llama": "Llama"}


def tiny(family: str, **settings: Any) -> Any:
    """A model of transformers with no tensor of equal values."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**(SHAPE | settings))
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def saved(folder: Path, family: str, **settings: Any) -> Tensors:
    model = tiny(family, **settings)
    model.save_pretrained(folder)
    return dict(model.state_dict())


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], **settings: object) -> Path:
    """The same folder with other tensors and other settings; a setting of ... is taken out."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def same(tensors: Tensors) -> Tensors:
    return tensors


def test_phi_as_transformers_writes_it(tmp_path: Path) -> None:
    state = saved(tmp_path, "phi", num_key_value_heads=2, partial_rotary_factor=0.5, resid_pdrop=0.1)
    source = open_language(tmp_path)
    assert source.config == PhiConfig(**(NUMBERS | {"num_kv_heads": 2}), rotary_dim=4, residual_dropout=0.1)
    ours = dict(source.stream())
    assert len(ours) == len(state)
    for name, theirs in (
        ("layers.1.attention.k.bias", "model.layers.1.self_attn.k_proj.bias"),
        ("layers.1.attention.o.weight", "model.layers.1.self_attn.dense.weight"),
        ("layers.0.attention_norm.bias", "model.layers.0.input_layernorm.bias"),
        ("layers.0.mlp.up.weight", "model.layers.0.mlp.fc1.weight"),
        ("layers.0.mlp.down.bias", "model.layers.0.mlp.fc2.bias"),
        ("norm.weight", "model.final_layernorm.weight"),
        ("head.bias", "lm_head.bias"),
    ):
        assert torch.equal(ours[name], state[theirs]), name


def to_dev(tensors: Tensors) -> Tensors:
    """q, k and v of one head, then of the next, written out row by row."""
    out = {n: t for n, t in tensors.items() if not any(f"self_attn.{x}_proj" in n for x in "qkv")}
    for i in range(2):
        for leaf in ("weight", "bias"):
            prefix = f"model.layers.{i}.self_attn."
            rows = [
                tensors[f"{prefix}{part}_proj.{leaf}"][row]
                for head in range(4) for part in "qkv" for row in range(8 * head, 8 * head + 8)
            ]  # fmt: skip
            out[f"{prefix}query_key_value.{leaf}"] = torch.stack(rows)
    return out


def to_microsoft(tensors: Tensors) -> Tensors:
    out = {"transformer.embd.wte.weight": tensors["model.embed_tokens.weight"]}
    for leaf in ("weight", "bias"):
        out[f"lm_head.ln.{leaf}"] = tensors[f"model.final_layernorm.{leaf}"]
        out[f"lm_head.linear.{leaf}"] = tensors[f"lm_head.{leaf}"]
        for i in range(2):
            theirs, hf = f"transformer.h.{i}.", f"model.layers.{i}."
            out[f"{theirs}mixer.Wqkv.{leaf}"] = torch.cat([tensors[f"{hf}self_attn.{x}_proj.{leaf}"] for x in "qkv"])
            for new, old in (("ln", "input_layernorm"), ("mixer.out_proj", "self_attn.dense"), ("mlp.fc1", "mlp.fc1"),
                             ("mlp.fc2", "mlp.fc2")):  # fmt: skip
                out[f"{theirs}{new}.{leaf}"] = tensors[f"{hf}{old}.{leaf}"]
    return out | {"transformer.h.0.mixer.rotary_emb.inv_freq": torch.ones(2)}


def to_imp(tensors: Tensors) -> Tensors:
    """The first Imp: Microsoft's Phi-2 with a projector."""
    projector = {f"transformer.mm_projector.{leaf}": torch.ones(32) for leaf in ("0.bias", "2.bias")}
    projector |= {"transformer.mm_projector.0.weight": torch.ones(32, 20), "transformer.mm_projector.2.weight": SQUARE}
    return to_microsoft(tensors) | projector


MICROSOFT = {
    "model_type": "phi-msft", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_head_kv": None,
    "rotary_dim": 4, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0,
    "embd_pdrop": 0.0, "resid_pdrop": 0.1, "vocab_size": 24, "n_positions": 64,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["dev", "microsoft"])
def test_the_other_layouts_of_phi_give_the_same_tensors(tmp_path: Path, layout: str) -> None:
    saved(tmp_path, "phi", partial_rotary_factor=0.5, resid_pdrop=0.1)
    before = open_language(tmp_path)
    expected, config = {name: tensor.clone() for name, tensor in before.stream()}, before.config  # type: ignore[union-attr]
    rewrite(tmp_path, to_dev if layout == "dev" else to_microsoft)
    if layout != "dev":
        (tmp_path / "config.json").write_text(json.dumps(MICROSOFT))
    source = open_language(tmp_path)
    assert source.config == config
    ours = dict(source.stream())
    assert sorted(ours) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name  # type: ignore[arg-type]
    file = load_file(tmp_path / "model.safetensors")
    held = sum(tensor.nbytes for name, tensor in file.items() if "inv_freq" not in name)
    assert sum(source.sizes.values()) == held


def test_the_first_imp(tmp_path: Path) -> None:
    state = saved(tmp_path, "phi", partial_rotary_factor=0.5)
    rewrite(tmp_path, to_imp)
    said = {
        "model_type": "imp",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_projector_type": "mlp2x_gelu",
    }
    (tmp_path / "config.json").write_text(json.dumps(MICROSOFT | said))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "vlm" and checkpoint.vision is None and checkpoint.settings is not None
    assert checkpoint.language is not None and checkpoint.language.config.head_bias
    assert len(checkpoint.language.names) == len(state)
    assert sorted(checkpoint.projector or {}) == [f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("bias", "weight")]


def test_fused_layouts_have_no_grouped_queries(tmp_path: Path) -> None:
    saved(tmp_path, "phi")
    rewrite(tmp_path, to_dev, num_key_value_heads=2)
    with pytest.raises(WeightsError) as caught:
        open_language(tmp_path)
    assert any("query_key_value.weight: got 96x32, expected" in line for line in caught.value.mismatched)


def test_microsofts_inner_width_is_four_times_the_width_where_it_says_none(tmp_path: Path) -> None:
    saved(tmp_path, "phi", intermediate_size=128)
    rewrite(tmp_path, to_microsoft)
    (tmp_path / "config.json").write_text(json.dumps(MICROSOFT | {"n_inner": None}))
    assert open_language(tmp_path).config.ffn_dim == 128


def test_bunnys_phi_has_no_bias_in_the_head(tmp_path: Path) -> None:
    saved(tmp_path, "phi")
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if n != "lm_head.bias"}, model_type="bunny-phi")
    source = open_language(tmp_path)
    assert isinstance(source.config, PhiConfig) and not source.config.head_bias
    assert "head.bias" not in source.names


def test_phi3_stays_fused(tmp_path: Path) -> None:
    state = saved(tmp_path, "phi3", num_key_value_heads=2, sliding_window=5, rms_norm_eps=1e-6)
    source = open_language(tmp_path)
    assert source.config == Phi3Config(**(NUMBERS | {"num_kv_heads": 2}), norm_eps=1e-6, window=5)
    ours = dict(source.stream())
    assert len(ours) == len(state)
    assert torch.equal(ours["layers.1.attention.qkv.weight"], state["model.layers.1.self_attn.qkv_proj.weight"])
    assert torch.equal(ours["layers.0.mlp.gate_up.weight"], state["model.layers.0.mlp.gate_up_proj.weight"])
    rewrite(tmp_path, same, sliding_window=None)
    assert open_language(tmp_path).config.window is None


@pytest.mark.parametrize("old", [False, True])
def test_stablelm(tmp_path: Path, old: bool) -> None:
    state = saved(tmp_path, "stablelm", **WIDE_HEAD, use_qkv_bias=True, layer_norm_eps=1e-6)
    if old:  # as Stability wrote it at first
        rewrite(tmp_path, same, model_type="stablelm_epoch", rope_pct=0.25, rope_theta=10000, norm_eps=1e-6,
                rope_parameters=..., layer_norm_eps=..., partial_rotary_factor=...)  # fmt: skip
    source = open_language(tmp_path)
    numbers = NUMBERS | {"num_heads": 2, "num_kv_heads": 2}
    assert source.config == StableLMConfig(**numbers, norm_eps=1e-6, rotary_dim=4, qkv_bias=True)
    ours = dict(source.stream())
    assert len(ours) == len(state)
    assert torch.equal(ours["layers.1.mlp_norm.bias"], state["model.layers.1.post_attention_layernorm.bias"])
    assert torch.equal(ours["layers.1.attention.v.bias"], state["model.layers.1.self_attn.v_proj.bias"])


def test_stablelm_without_biases(tmp_path: Path) -> None:
    saved(tmp_path, "stablelm", **WIDE_HEAD)
    assert not open_language(tmp_path).config.qkv_bias


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("phi", {"qk_layernorm": True}, "qk_layernorm True"),
        ("phi", {"embd_pdrop": 0.1}, "embd_pdrop 0.1"),
        ("phi", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("phi", {"resid_pdrop": 1}, "resid_pdrop is 1; expected a number from 0 to below 1"),
        ("phi", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "3 of a head.s 8 channels turn"),
        ("phi", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "type 'su'"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ("phi3", {"sliding_window": 0}, "sliding_window is 0"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm True"),
    ],
)
def test_what_is_not_computed_is_refused_by_key_and_value(
    tmp_path: Path, family: str, settings: dict[str, object], message: str
) -> None:
    saved(tmp_path, family, **(WIDE_HEAD if family == "stablelm" else {}))
    with pytest.raises(WeightsError, match=message):
        open_language(rewrite(tmp_path, same, **settings))


@pytest.mark.parametrize("family", list(CLASSES))
@pytest.mark.parametrize("said", [..., "llava"])
def test_the_tensors_say_the_family_where_the_settings_do_not(tmp_path: Path, family: str, said: object) -> None:
    saved(tmp_path, family, **(WIDE_HEAD if family == "stablelm" else {}))
    expected = open_language(tmp_path).config
    assert expected.family == family
    assert open_language(rewrite(tmp_path, same, model_type=said)).config == expected


def test_tensors_of_no_family(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    rewrite(tmp_path, lambda t: {f"gpt.{name}": v for name, v in t.items()}, model_type=...)
    with pytest.raises(WeightsError, match="no known language model"):
        open_language(tmp_path)


@pytest.mark.parametrize("family", list(CLASSES))
def test_what_is_missing_extra_and_misshapen_is_listed_by_the_files_names(tmp_path: Path, family: str) -> None:
    saved(tmp_path, family)

    def damage(tensors: Tensors) -> Tensors:
        del tensors["model.layers.1.input_layernorm.weight"]
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(31)
        return tensors | {"model.layers.2.input_layernorm.weight": torch.ones(32)}

    with pytest.raises(WeightsError) as caught:
        open_language(rewrite(tmp_path, damage))
    assert caught.value.missing == ["model.layers.1.input_layernorm.weight"]
    assert caught.value.extra == ["model.layers.2.input_layernorm.weight"]
    assert caught.value.mismatched == ["model.layers.0.input_layernorm.weight: got 31, expected 32"]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}),
    ("phi", {"partial_rotary_factor": 0.25, "resid_pdrop": 0.1, "layer_norm_eps": 1e-6}),
    ("phi3", {"sliding_window": 7, "num_key_value_heads": 1}),
    ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    ("phi", {"hidden_size": 176, "partial_rotary_factor": 0.69}),  # 30 of 44: 44 * (30 / 44) rounds down to 29
    ("stablelm", {**WIDE_HEAD, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
def test_the_settings_that_are_written_make_the_same_model_in_transformers(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """`config_of` and `settings_of` are inverse, and transformers reads the latter as what it wrote itself."""
    saved(tmp_path, family, **settings, rope_theta=777.0)
    config = open_language(tmp_path).config
    written = family_named(family).settings_of(config)
    theirs = getattr(transformers, f"{CLASSES[family]}Config")
    before, after = theirs.from_pretrained(tmp_path), theirs.from_dict(dict(written))
    for key in sorted(written.keys() - {"architectures", "rope_theta", "partial_rotary_factor"}):
        assert getattr(after, key) == getattr(before, key), key
    for said in (before, after):
        assert (said.rope_parameters["rope_type"], said.rope_parameters["rope_theta"]) == ("default", 777.0)
        factor = said.rope_parameters.get("partial_rotary_factor", 1.0)
        assert int(config.head_dim * factor) == config.rotary  # transformers' own formula
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert open_language(tmp_path).config == config


def test_every_type_belongs_to_one_family() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))
