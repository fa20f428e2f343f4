"""Weights that bitsandbytes quantized, saved as transformers saves them, and read bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.int8 import Int8Tensor, quantize_int8
from kernels.nf4 import NF4Tensor, quantize_nf4
from models.language.decoder import Decoder
from models.linear import Linear
from models.placement import fill, stored
from models.quantized import parts
from models.weights.checkpoint import open_checkpoint
from models.weights.errors import WeightsError
from models.weights.language import open_language
from models.weights.prequantized import dense

transformers = pytest.importorskip("transformers")
functional = pytest.importorskip("bitsandbytes.functional")

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 24,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Tensors:
    """A LLaMA in fp16 in `tmp_path`, with its 16-bit weights."""
    torch.manual_seed(0)
    tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).half()
    tiny.save_pretrained(tmp_path)
    return dict(tiny.state_dict())


def nf4(weight: Tensor, name: str, **kinds: Any) -> Tensors:
    """What bitsandbytes puts into a file for one weight."""
    kinds = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"} | kinds
    packed, state = functional.quantize_4bit(weight, **kinds)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def int8(weight: Tensor, name: str) -> Tensors:
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    module = name.removesuffix(".weight")
    form = torch.zeros((), dtype=torch.uint8)
    return {name: codes, f"{module}.SCB": scale, f"{module}.weight_format": form}


def quantized(folder: Path, make: Any, **kinds: Any) -> Path:
    """The linears of the layers as `make` puts them into a file; the rest stays."""
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= make(tensor, name, **kinds) if name.endswith("_proj.weight") else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "bitsandbytes", "load_in_4bit": make is nf4, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder


def filled(folder: Path, bits: int) -> Decoder:
    source = open_language(folder)
    with torch.device("meta"):
        decoder = Decoder(source.config)

    def of(name: str) -> int:
        return 16 if name == "head.weight" else bits

    fill(decoder, source.stream(), bits=of, device=CPU, dtype=torch.float16, source=str(folder))
    return decoder


@pytest.mark.parametrize(("make", "bits"), [(nf4, 4), (int8, 8)])
def test_what_bitsandbytes_quantized_is_what_we_would_have_made(
    tmp_path: Path, model: Tensors, make: Any, bits: int
) -> None:
    """Every part of every weight, bit for bit, taken from the file and not made again."""
    ours = filled(tmp_path, bits)
    theirs = filled(quantized(tmp_path, make), bits)
    packed = 0
    for name, module in ours.named_modules():
        if isinstance(module, Linear) and name != "head":
            mine, taken = module.frozen_weight(), stored(theirs, f"{name}.weight")
            assert isinstance(mine, NF4Tensor | Int8Tensor) and isinstance(taken, NF4Tensor | Int8Tensor)
            assert taken.shape == mine.shape and taken.dtype == mine.dtype
            for part, tensor in parts(mine).items():
                assert torch.equal(parts(taken)[part], tensor), f"{name}.{part}"
            packed += 1
    assert packed == 14
    assert torch.equal(theirs.head.frozen_weight(), ours.head.frozen_weight())  # type: ignore[arg-type]


def test_a_source_gives_packed_weights_and_counts_all_their_bytes(tmp_path: Path, model: Tensors) -> None:
    source = open_language(quantized(tmp_path, nf4))
    weight = source.fetch("layers.1.mlp.gate.weight")
    assert isinstance(weight, NF4Tensor) and weight.shape == (136, 64)
    whole = quantize_nf4(model["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(weight.codes, whole.codes) and torch.equal(weight.offset, whole.offset)
    assert sum(source.sizes.values()) == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    source.release("layers.1.mlp.gate.weight")
    source.close()
    again = source.fetch("layers.1.mlp.gate.weight")
    assert isinstance(again, NF4Tensor) and torch.equal(again.codes, whole.codes)


@pytest.mark.parametrize(("make", "held", "bits"), [(nf4, 4, 16), (nf4, 4, 8), (int8, 8, 4), (int8, 8, 16)])
def test_other_bits_than_the_files_are_refused(tmp_path: Path, model: Tensors, make: Any, held: int, bits: int) -> None:
    """16 bits made of 4 would look like the model and not be it."""
    with pytest.raises(WeightsError, match="quantized already") as caught:
        filled(quantized(tmp_path, make), bits)
    assert len(caught.value.mismatched) == 14
    assert caught.value.mismatched[0].endswith(f"weight: {held} bits in the file, {bits} asked")
    assert "16 bits" in caught.value.do


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"blocksize": 128}, "blocksize 128; 64 is accepted"),
        ({"quant_type": "fp4"}, "quant_state.bitsandbytes__nf4, got .*bitsandbytes__fp4"),
        ({"compress_statistics": False}, "absmax in 8 bits is accepted"),
    ],
)
def test_other_ways_of_quantizing_are_refused_in_words(
    tmp_path: Path, model: Tensors, kinds: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        open_language(quantized(tmp_path, nf4, **kinds))
    assert caught.value.file == str(tmp_path) and "16-bit model" in caught.value.do


def test_int8_in_another_order_is_refused(tmp_path: Path, model: Tensors) -> None:
    def turned(weight: Tensor, name: str) -> Tensors:
        return int8(weight, name) | {name.replace(".weight", ".weight_format"): torch.ones((), dtype=torch.uint8)}

    source = open_language(quantized(tmp_path, turned))
    with pytest.raises(WeightsError, match="weight_format is 1"):
        source.fetch("layers.0.attention.q.weight")


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_state.bitsandbytes__nf4"])
def test_a_part_that_is_missing_is_named(tmp_path: Path, model: Tensors, part: str) -> None:
    path = quantized(tmp_path, nf4) / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.0.self_attn.q_proj.weight.{part}"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        open_language(tmp_path)


def test_parts_without_their_weight_are_listed(tmp_path: Path, model: Tensors) -> None:
    path = quantized(tmp_path, nf4) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="without the weights") as caught:
        open_language(tmp_path)
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in caught.value.extra


def test_a_quantized_weight_that_is_no_linears_is_refused(tmp_path: Path, model: Tensors) -> None:
    path = tmp_path / "model.safetensors"
    name = "model.embed_tokens.weight"
    save_file(load_file(path) | nf4(model[name], name), path)
    with pytest.raises(WeightsError, match="quantized already") as caught:
        filled(tmp_path, 4)
    assert caught.value.mismatched == ["embed.weight: 4 bits in the file, 16 asked"]


def test_a_folder_that_transformers_wrote_in_4_bits(tmp_path: Path, model: Tensors) -> None:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    loaded.save_pretrained(tmp_path / "packed")
    ours, theirs = filled(tmp_path, 4), filled(tmp_path / "packed", 4)
    mine, taken = (stored(m, "layers.1.mlp.down.weight") for m in (ours, theirs))
    assert isinstance(mine, NF4Tensor) and isinstance(taken, NF4Tensor)
    for part, tensor in parts(mine).items():
        assert torch.equal(parts(taken)[part], tensor), part


@pytest.mark.parametrize("bits", [4, 8])
def test_a_whole_llava_that_transformers_wrote_in_few_bits(tmp_path: Path, bits: int) -> None:
    """Tower and projector too, as in unsloth's: the tower stays as it is, the projector is what it computed with."""
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}  # fmt: skip
    shape = transformers.LlavaConfig(vision_config=vision, text_config=SHAPE | {"model_type": "llama"})
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(shape).half().save_pretrained(tmp_path)
    kinds = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **kinds)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float16
    )
    loaded.save_pretrained(tmp_path / "packed")
    before, after = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "packed")
    assert before.vision is not None and after.vision is not None and after.language is not None
    assert isinstance(after.language.fetch("layers.0.attention.q.weight"), NF4Tensor | Int8Tensor)

    def made(weight: object) -> NF4Tensor | Int8Tensor:
        assert isinstance(weight, Tensor)
        return quantize_nf4(weight) if bits == 4 else quantize_int8(weight)

    for name in before.vision.names:
        plain, packed = before.vision.fetch(name), after.vision.fetch(name)
        if isinstance(packed, Tensor):
            assert isinstance(plain, Tensor) and torch.equal(packed, plain) and not name.endswith("fc1.weight"), name
            continue
        for part, tensor in parts(made(plain)).items():
            assert torch.equal(parts(packed)[part], tensor), f"{name}.{part}"
    assert sum(not isinstance(after.vision.fetch(name), Tensor) for name in after.vision.names) == 6
    assert before.projector is not None and after.projector is not None
    for name, weight in before.projector.items():
        computed = dense(made(weight)) if name.endswith("weight") else weight
        assert after.projector[name].dtype == torch.float16 and torch.equal(after.projector[name], computed), name
    with pytest.raises(WeightsError, match="is quantized in its file"):
        dict(after.vision.unused())


def test_int8_weights_are_ours_too(model: Tensors) -> None:
    """The rule of `kernels/int8.py` on the same weight; a sample of what `filled` compares."""
    weight = model["model.layers.0.mlp.up_proj.weight"]
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    mine = quantize_int8(weight)
    assert torch.equal(mine.codes, codes) and torch.equal(mine.scale, scale)


def test_q_k_and_v_in_one_quantized_weight_are_not_taken_apart(tmp_path: Path) -> None:
    """Microsoft's Phi: the borders of its thirds may lie within a block."""
    config = transformers.PhiConfig(**SHAPE | {"num_key_value_heads": 4, "num_hidden_layers": 1})
    transformers.PhiForCausalLM(config).half().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, stem = load_file(path), "model.layers.0.self_attn."
    for leaf in ("weight", "bias"):
        thirds = [tensors.pop(f"{stem}{part}_proj.{leaf}") for part in "qkv"]
        tensors[f"{stem}query_key_value.{leaf}"] = torch.cat(thirds)
    name = f"{stem}query_key_value.weight"
    save_file(tensors | nf4(tensors[name], name), path)
    with pytest.raises(WeightsError, match="holds q, k and v and is quantized"):
        dict(open_language(tmp_path).stream())
