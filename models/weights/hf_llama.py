"""LLaMA in Hugging Face's layout (config.json and safetensors or .bin files), which is also that of merged Vicuna.

Hugging Face rotates channel i together with i + d/2, we (as Meta) rotate 2i with 2i + 1. The rows of q and k were
re-ordered for that, head by head, and are put back here.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights.errors import WeightsError
from models.weights.hf_files import HfTensors, tensor_files
from models.weights.names import Names, check_shapes, language_shapes
from models.weights.settings import MOST_LAYERS, MOST_VOCABULARY, MOST_WIDTH, Settings, read_settings
from models.weights.source import LanguageSource

NAMES = Names(
    outside={"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
             "head.weight": "lm_head.weight"},
    layer="model.layers.{}.",
    modules={
        "attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    },
)  # fmt: skip
IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


def open_hf(folder: Path, *, unpermute: bool = True) -> LanguageSource:
    """A LLaMA from `folder`. With `unpermute=False` q and k stay in Hugging Face's order (see `open_vicuna`).

    Raises:
        WeightsError: a file is missing or damaged, config.json describes another architecture, or tensors are missing,
            unknown or of another shape (all listed).
    """
    settings = read_settings(folder / "config.json")
    config = llama_config(settings)
    tensors = HfTensors(tensor_files(folder))
    tied = bool(settings.values.get("tie_word_embeddings"))
    ours = {NAMES.of(name): name for name in language_shapes(config)}
    expected = {NAMES.of(name): shape for name, shape in language_shapes(config).items()}
    found = {name: shape for name, shape in tensors.shapes.items() if not IGNORED.fullmatch(name)}
    if tied:
        found.setdefault(NAMES.of("head.weight"), expected[NAMES.of("head.weight")])
    check_shapes(folder, found, expected)

    def theirs(name: str) -> str:
        return NAMES.of("embed.weight" if tied and name == "head.weight" else name)

    def reordered(name: str) -> bool:
        return unpermute and name.endswith(("attention.q.weight", "attention.k.weight"))

    def fetch(name: str) -> Tensor:
        tensor = tensors.fetch(theirs(name))
        return to_interleaved(tensor, config.head_dim) if reordered(name) else tensor

    names = tuple(ours[name] for name in found)
    return LanguageSource(
        config=config, files=(settings.path, *tensors.files), names=names,
        sizes={name: tensors.sizes[theirs(name)] for name in names},
        fetch=fetch, release=lambda name: tensors.release(theirs(name)), close=tensors.close, allocated=reordered,
    )  # fmt: skip


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [H * d, D] from the half-split to the interleaved order: per head [2, d/2] -> [d/2, 2]."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def llama_config(settings: Settings) -> LlamaConfig:
    """The numbers of a LLaMA's config.json; a WeightsError for anything that our LLaMA does not compute."""
    if settings.values.get("model_type") != "llama":
        raise WeightsError(settings.path, f"model_type is {settings.values.get('model_type')!r}; expected 'llama'")
    for key, accepted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        settings.only(key, accepted)
    settings.only("quantization_config")
    dim = settings.integer("hidden_size", most=MOST_WIDTH)
    heads = settings.integer("num_attention_heads", most=dim)
    kv_heads = settings.integer("num_key_value_heads", most=heads, default=heads)
    if dim % (2 * heads) or heads % kv_heads:
        raise WeightsError(
            settings.path,
            f"hidden_size {dim}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not divide",
        )
    settings.only("head_dim", dim // heads)
    return LlamaConfig(
        vocab_size=settings.integer("vocab_size", most=MOST_VOCABULARY),
        dim=dim,
        num_layers=settings.integer("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_dim=settings.integer("intermediate_size", most=MOST_WIDTH),
        norm_eps=settings.real("rms_norm_eps"),
        rope_theta=_rope_theta(settings),
    )


def _rope_theta(settings: Settings) -> float:
    """transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling, the first ones nothing."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = settings.inner(key)
        if rope is not None:
            rope.only("rope_type", "default")
            rope.only("type", "default")
            rope.only("partial_rotary_factor", 1.0)
            if "rope_theta" in rope.values:
                return rope.real("rope_theta")
    return settings.real("rope_theta", default=10000.0)
