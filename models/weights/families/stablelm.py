"""StableLM-2 in Hugging Face's layout, alone or within Bunny; `stablelm_epoch` is its first spelling."""

from __future__ import annotations

from models.language.config import DecoderConfig
from models.language.stablelm import StableLMConfig
from models.weights.families import hugging_face as hf
from models.weights.families.family import Family, Layout
from models.weights.names import Names
from models.weights.settings import Settings

NAMES = Names(hf.outside(hf.EMBED, "model.norm", "lm_head"), hf.LAYER, hf.ATTENTION | hf.MLP)
OLD_KEYS = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}  # stablelm_epoch's -> transformers'


def config_of(settings: Settings) -> StableLMConfig:
    """The numbers of a StableLM's config.json; a WeightsError for anything that our StableLM does not compute."""
    settings = settings.respelled(OLD_KEYS)
    settings.only("hidden_act", "silu")
    for key in ("qk_layernorm", "use_parallel_residual"):
        settings.only(key, False)
    for key in ("hidden_dropout", "attention_dropout"):
        settings.only(key, 0.0)
    numbers, turn = hf.widths(settings), hf.rotation(settings, factor=0.25)
    head_dim = numbers["dim"] // numbers["num_heads"]
    return StableLMConfig(
        **numbers, norm_eps=settings.real("layer_norm_eps", default=1e-5), rope_theta=turn.theta,
        rotary_dim=hf.rotary_dim(settings, head_dim, head_dim * turn.factor),
        qkv_bias=settings.flag("use_qkv_bias"),
    )  # fmt: skip


def settings_of(config: DecoderConfig) -> dict[str, object]:
    """The config.json that transformers reads."""
    return hf.written(config, "stablelm", "StableLmForCausalLM") | {
        "hidden_act": "silu", "layer_norm_eps": config.norm_eps, "use_qkv_bias": config.qkv_bias,
        "partial_rotary_factor": hf.partial_rotary_factor(config), "qk_layernorm": False,
        "use_parallel_residual": False,
    }  # fmt: skip


FAMILY = Family(
    name="stablelm",
    model_types=frozenset(("stablelm", "stablelm_epoch", "bunny-stablelm")),
    config_of=config_of,
    settings_of=settings_of,
    layouts=(
        Layout(("model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.bias",
                "model.layers.0.mlp.gate_proj.weight"), lambda _: NAMES),
    ),
)  # fmt: skip
