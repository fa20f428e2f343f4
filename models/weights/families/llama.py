"""LLaMA, Vicuna and LLaMA-3 in Hugging Face's layout, alone or within LLaVA and Bunny.

Hugging Face rotates channel i together with i + d/2, Meta 2i with 2i + 1; q and k are left as the files have them.
"""

from __future__ import annotations

from models.language.config import DecoderConfig
from models.language.llama import LlamaConfig
from models.weights.families import hugging_face as hf
from models.weights.families.family import Family, Layout
from models.weights.names import Names
from models.weights.settings import Settings

NAMES = Names(hf.outside(hf.EMBED, "model.norm", "lm_head"), hf.LAYER, hf.ATTENTION | hf.MLP)


def config_of(settings: Settings) -> LlamaConfig:
    """The numbers of a LLaMA's config.json; a WeightsError for anything that our LLaMA does not compute."""
    settings.only("hidden_act", "silu")
    settings.only("attention_dropout", 0.0)
    bias = settings.flag("attention_bias")
    return LlamaConfig(
        **hf.widths(settings), norm_eps=settings.real("rms_norm_eps"), rope_theta=hf.rotation(settings).theta,
        rope_interleaved=False, qkv_bias=bias, o_bias=bias, mlp_bias=settings.flag("mlp_bias"),
    )  # fmt: skip


def settings_of(config: DecoderConfig) -> dict[str, object]:
    """The config.json that transformers reads."""
    return hf.written(config, "llama", "LlamaForCausalLM") | {
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias, "head_dim": config.head_dim,
    }  # fmt: skip


FAMILY = Family(
    name="llama",
    model_types=frozenset(("llama", "llava", "llava_llama", "bunny-llama")),
    config_of=config_of,
    settings_of=settings_of,
    layouts=(
        Layout(("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"), lambda _: NAMES),
    ),
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-6,
    },
)  # fmt: skip
