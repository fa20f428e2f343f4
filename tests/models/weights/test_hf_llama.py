from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights.errors import WeightsError
from models.weights.language import open_language
from models.weights.rope_order import is_rotated, to_half_split, to_interleaved

transformers = pytest.importorskip("transformers")

Tensors = dict[str, Tensor]
Write = Callable[..., Path]


def tiny(**settings: object) -> object:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 24, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | settings)))


def test_the_inverse_of_an_independent_reordering(half_split: Callable[[Tensor], Tensor]) -> None:
    weight = torch.arange(32 * 3.0).reshape(32, 3)
    assert not torch.equal(half_split(weight), weight)
    assert torch.equal(to_interleaved(half_split(weight), 8), weight)
    assert torch.equal(to_half_split(weight, 8), half_split(weight))


def test_channels_that_do_not_turn_stay() -> None:
    weight = torch.arange(16.0)[:, None]  # two heads of 8, of which 4 turn
    moved = to_interleaved(weight, 8, 4)
    assert moved.flatten().tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    assert torch.equal(to_half_split(moved, 8, 4), weight)


def test_scores_with_interleaved_rope_are_those_of_transformers() -> None:
    """q k^T / sqrt(d), rotated as complex numbers here and by halves there."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny()
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 7, 32)
    cos, sin = model.model.rotary_emb(x, torch.arange(7)[None])
    halves = [p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)]
    q, k = apply_rotary_pos_emb(*halves, cos, sin)
    angles = torch.arange(7.0)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(angles), angles)  # [7, d / 2]

    def rotated(weight: Tensor) -> Tensor:
        heads = (x[0] @ to_interleaved(weight, 8).T).unflatten(-1, (4, 4, 2)).transpose(0, 1)  # [H, 7, d / 2, 2]
        return torch.view_as_real(torch.view_as_complex(heads.contiguous()) * turn).flatten(2)

    ours = rotated(attention.q_proj.weight) @ rotated(attention.k_proj.weight).transpose(1, 2)
    torch.testing.assert_close(ours, (q @ k.transpose(2, 3))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_a_folder_that_transformers_wrote(
    tmp_path: Path, hf_tensors: Callable[[Tensors], Tensors], shard_size: str
) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    source = open_language(tmp_path)
    assert source.config == LlamaConfig(
        vocab_size=24, dim=32, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=48, norm_eps=1e-5,
        rope_interleaved=False,
    )  # fmt: skip
    assert (len(source.files) > 2) == (shard_size == "10KB")
    back = hf_tensors(dict(source.stream()))
    state = model.state_dict()
    assert sorted(state) == sorted(name for name in back if not name.endswith("inv_freq"))
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_bin_shards_with_an_index(
    tmp_path: Path, language: Tensors, write_hf: Write, assert_same: Callable[..., None]
) -> None:
    source = open_language(write_hf(tmp_path, language))
    assert_same(source.stream(), language)
    assert [path.name[:15] for path in source.files] == ["config.json", "pytorch_model-0", "pytorch_model-0"]


def test_grouped_queries(tmp_path: Path) -> None:
    model = tiny(num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    source = open_language(tmp_path)
    assert source.config.num_kv_heads == 2
    weight = model.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(source.fetch("layers.1.attention.k.weight"), weight)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tensors = dict(open_language(tmp_path).stream())
    assert torch.equal(tensors["head.weight"], tensors["embed.weight"])


@pytest.mark.parametrize(
    ("settings", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 500.0}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, 700.0),
        ({"rope_scaling": None}, 10000.0),
    ],
)
def test_every_spelling_of_the_rotation(
    tmp_path: Path, language: Tensors, write_hf: Write, settings: dict[str, object], theta: float
) -> None:
    assert open_language(write_hf(tmp_path, language, **settings)).config.rope_theta == theta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported are .*bunny-llama, .*llama, .*phi3, stablelm"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type 'llama3'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' .*'bitsandbytes'"),
        ({"num_attention_heads": 3}, "do not divide"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
    ],
)
def test_settings_of_another_architecture_name_the_key(
    tmp_path: Path, language: Tensors, write_hf: Write, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        open_language(write_hf(tmp_path, language, **settings))


def test_every_difference_is_listed(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        open_language(tmp_path)
    assert caught.value.missing == ["lm_head.weight"]
    assert caught.value.extra == ["model.layers.0.self_attn.q_proj.bias"]
    assert caught.value.mismatched == ["model.norm.weight: got 31, expected 32"]


@pytest.mark.parametrize("rows", [20, 31])
def test_a_vocabulary_that_was_shrunk_or_enlarged_is_that_of_the_embedding(
    tmp_path: Path, language: Tensors, write_hf: Write, assert_same: Callable[..., None], rows: int
) -> None:
    resized = language | {name: torch.ones(rows, 32) for name in ("embed.weight", "head.weight")}
    source = open_language(write_hf(tmp_path, resized))  # config.json says 24
    assert source.config.vocab_size == rows
    assert_same(source.stream(), resized)


def test_embedding_and_head_of_different_vocabularies(tmp_path: Path, language: Tensors, write_hf: Write) -> None:
    with pytest.raises(WeightsError) as caught:
        open_language(write_hf(tmp_path, language | {"embed.weight": torch.ones(20, 32)}))
    assert caught.value.mismatched == ["lm_head.weight: got 24x32, expected 20x32"]


def test_biases_of_attention_and_mlp(tmp_path: Path) -> None:
    model = tiny(attention_bias=True, mlp_bias=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    source = open_language(tmp_path)
    assert (source.config.qkv_bias, source.config.o_bias, source.config.mlp_bias) == (True, True, True)
    state, ours = model.state_dict(), dict(source.stream())
    assert len(ours) == len(state)
    assert torch.equal(ours["layers.1.attention.o.bias"], state["model.layers.1.self_attn.o_proj.bias"])
    assert torch.equal(ours["layers.0.mlp.down.bias"], state["model.layers.0.mlp.down_proj.bias"])


def test_a_shard_that_is_not_there(tmp_path: Path, language: Tensors, write_hf: Write) -> None:
    (write_hf(tmp_path, language) / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match="1 of 2 shards are not there") as caught:
        open_language(tmp_path)
    assert caught.value.missing == ["pytorch_model-00002-of-00002.bin"] and caught.value.do


def test_an_index_may_not_leave_its_folder(tmp_path: Path, language: Tensors, write_hf: Write) -> None:
    index = {"weight_map": {"lm_head.weight": "../other/model.bin"}}
    (write_hf(tmp_path, language) / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="stands beside its index"):
        open_language(tmp_path)


def test_a_shard_that_was_not_copied_to_its_end(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged or was not copied to its end") as caught:
        open_language(tmp_path)
    assert caught.value.file == str(shard)


@pytest.mark.parametrize("where", ["one shard", "none"])
def test_an_index_that_lies(tmp_path: Path, where: str) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight" if where == "one shard" else "model.extra.weight"] = shards[0]
    assert json.loads(path.read_text()) != index
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="the index and the shards do not agree") as caught:
        open_language(tmp_path)
    listed = caught.value.mismatched if where == "one shard" else caught.value.missing
    assert len(listed) == 1 and listed[0].startswith("model.norm" if where == "one shard" else "model.extra")


def test_settings_without_weights(tmp_path: Path, language: Tensors, write_hf: Write) -> None:
    for path in write_hf(tmp_path, language).glob("pytorch*"):
        path.unlink()
    with pytest.raises(WeightsError, match="no index of shards"):
        open_language(tmp_path)


def test_the_tensors_whose_rows_change_places() -> None:
    """Those with a row for each channel of q or k: weights, biases and the B of a LoRA, not its A."""
    for leaf in ("weight", "bias", "lora.b"):
        assert is_rotated(f"layers.11.attention.q.{leaf}") and is_rotated(f"layers.0.attention.k.{leaf}")
        assert not is_rotated(f"layers.0.attention.v.{leaf}") and not is_rotated(f"layers.0.attention.qk.{leaf}")
    assert not is_rotated("layers.0.attention.q.lora.a") and not is_rotated("embed.weight")
