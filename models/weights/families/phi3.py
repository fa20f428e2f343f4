"""Phi-3-mini, alone or within Bunny and Imp: qkv_proj [Q | K | V] and gate_up_proj [gate | up] stay fused."""

from __future__ import annotations

from models.language.config import DecoderConfig
from models.language.phi3 import Phi3Config
from models.weights.families import hugging_face as hf
from models.weights.families.family import Family, Layout
from models.weights.names import Names
from models.weights.settings import MOST_POSITIONS, Settings

NAMES = Names(
    hf.outside(hf.EMBED, "model.norm", "lm_head"), hf.LAYER,
    {"attention.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj"} | hf.ATTENTION | hf.MLP,
)  # fmt: skip


def config_of(settings: Settings) -> Phi3Config:
    """The numbers of a Phi-3's config.json; a WeightsError for anything that our Phi-3 does not compute."""
    settings.only("hidden_act", "silu")
    for key in ("attention_dropout", "embd_pdrop"):
        settings.only(key, 0.0)
    settings.only("attention_bias", False)
    numbers, turn = hf.widths(settings), hf.rotation(settings)
    head_dim = numbers["dim"] // numbers["num_heads"]
    window = None
    if settings.values.get("sliding_window") is not None:
        window = settings.integer("sliding_window", most=MOST_POSITIONS)
    return Phi3Config(
        **numbers, norm_eps=settings.real("rms_norm_eps"), rope_theta=turn.theta,
        rotary_dim=hf.rotary_dim(settings, head_dim, head_dim * turn.factor), window=window,
        residual_dropout=settings.share("resid_pdrop"),
    )  # fmt: skip


def settings_of(config: DecoderConfig) -> dict[str, object]:
    """The config.json that transformers reads."""
    partial = {} if config.rotary_dim is None else {"partial_rotary_factor": hf.partial_rotary_factor(config)}
    return hf.written(config, "phi3", "Phi3ForCausalLM") | partial | {
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "sliding_window": config.window,
        "resid_pdrop": config.residual_dropout,
    }  # fmt: skip


FAMILY = Family(
    name="phi3",
    model_types=frozenset(("phi3", "bunny-phi3", "imp_phi3")),
    config_of=config_of,
    settings_of=settings_of,
    layouts=(Layout(("model.layers.0.self_attn.qkv_proj.weight",), lambda _: NAMES),),
)
