"""Tiny models as files: our tensors, and the same in the layouts of other projects, written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

DIM, HEADS, FFN, LAYERS, VOCABULARY = 32, 4, 48, 2, 24
Tensors = dict[str, Tensor]


@pytest.fixture
def language() -> Tensors:
    """A LLaMA under our names: fp16; q and k in whatever order the file has them."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    tensors = {"embed.weight": make(VOCABULARY, DIM)}
    for i in range(LAYERS):
        tensors |= {f"layers.{i}.{norm}.weight": make(DIM) for norm in ("attention_norm", "mlp_norm")}
        tensors |= {f"layers.{i}.attention.{part}.weight": make(DIM, DIM) for part in "qkvo"}
        tensors |= {f"layers.{i}.mlp.{part}.weight": make(FFN, DIM) for part in ("gate", "up")}
        tensors[f"layers.{i}.mlp.down.weight"] = make(DIM, FFN)
    return tensors | {"norm.weight": make(DIM), "head.weight": make(VOCABULARY, DIM)}


META = {
    "embed": ("tok_embeddings", 1), "norm": ("norm", None), "head": ("output", 0),
    "attention_norm": ("attention_norm", None), "mlp_norm": ("ffn_norm", None), "attention.q": ("attention.wq", 0),
    "attention.k": ("attention.wk", 0), "attention.v": ("attention.wv", 0), "attention.o": ("attention.wo", 1),
    "mlp.gate": ("feed_forward.w1", 0), "mlp.down": ("feed_forward.w2", 1), "mlp.up": ("feed_forward.w3", 0),
}  # fmt: skip
HF = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


def split_name(name: str) -> tuple[str, str]:
    """`layers.1.attention.q.weight` -> (`layers.1.`, `attention.q`)."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return "", module
    _, index, rest = module.split(".", 2)
    return f"layers.{index}.", rest


@pytest.fixture
def meta_shards() -> Callable[[Tensors, int], list[Tensors]]:
    def shards(tensors: Tensors, count: int) -> list[Tensors]:
        files: list[Tensors] = [{"rope.freqs": torch.ones(DIM // HEADS // 2)} for _ in range(count)]
        for name, tensor in tensors.items():
            layer, module = split_name(name)
            theirs, axis = META[module]
            parts = [tensor] * count if axis is None else tensor.chunk(count, dim=axis)
            for file, part in zip(files, parts, strict=True):
                file[f"{layer}{theirs}.weight"] = part.clone()
        return files

    return shards


@pytest.fixture
def write_meta(meta_shards: Callable[[Tensors, int], list[Tensors]]) -> Callable[..., Path]:
    def write(folder: Path, tensors: Tensors, count: int = 1, **params: object) -> Path:
        folder.mkdir(exist_ok=True)
        values = {
            "dim": DIM, "multiple_of": 256, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-6, "vocab_size": -1,
        }  # fmt: skip
        (folder / "params.json").write_text(json.dumps(values | params))
        for i, shard in enumerate(meta_shards(tensors, count)):
            torch.save(shard, folder / f"consolidated.{i:02d}.pth")
        return folder

    return write


@pytest.fixture
def half_split() -> Callable[[Tensor], Tensor]:
    """q or k from the interleaved order to Hugging Face's, row by row."""

    def reorder(weight: Tensor) -> Tensor:
        width = DIM // HEADS
        out = torch.empty_like(weight)
        for head in range(weight.shape[0] // width):
            for pair in range(width // 2):
                out[head * width + pair] = weight[head * width + 2 * pair]
                out[head * width + width // 2 + pair] = weight[head * width + 2 * pair + 1]
        return out

    return reorder


@pytest.fixture
def hf_order(half_split: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Our tensors with q and k in Hugging Face's order, which stays when its files are read."""

    def reorder(tensors: Tensors) -> Tensors:
        rotated = ("attention.q.weight", "attention.k.weight")
        return {name: half_split(tensor) if name.endswith(rotated) else tensor for name, tensor in tensors.items()}

    return reorder


@pytest.fixture
def hf_tensors() -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            layer, module = split_name(name)
            prefix = f"model.{layer}" if layer else ""
            out[f"{prefix}{HF[module]}.weight"] = tensor.clone()
        return out | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(DIM // HEADS // 2)}

    return rename


@pytest.fixture
def write_hf(hf_tensors: Callable[[Tensors], Tensors]) -> Callable[..., Path]:
    """As .bin shards with an index, as the first Vicunas were published."""

    def write(folder: Path, tensors: Tensors, **settings: object) -> Path:
        folder.mkdir(exist_ok=True)
        values = {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": DIM, "intermediate_size": FFN,
            "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(values | settings))
        items = list(hf_tensors(tensors).items())
        weight_map = {}
        for i, part in enumerate((items[:9], items[9:])):
            name = f"pytorch_model-0000{i + 1}-of-00002.bin"
            torch.save(dict(part), folder / name)
            weight_map |= dict.fromkeys(dict(part), name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


@pytest.fixture
def assert_same() -> Callable[[Iterable[tuple[str, Tensor]], Tensors], None]:
    """A stream has exactly these tensors, bit for bit."""

    def check(stream: Iterable[tuple[str, Tensor]], expected: Tensors) -> None:
        pairs = list(stream)
        assert sorted(name for name, _ in pairs) == sorted(expected)
        for name, tensor in pairs:
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name

    return check
