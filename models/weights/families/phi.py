"""Phi-1.5 and Phi-2, alone or within Bunny and Imp, in the three layouts in which they were published.

    transformers    self_attn.{q,k,v}_proj
    "dev"           self_attn.query_key_value [3 D, D]: q, k and v of the first head, of the second, ...
    Microsoft       transformer.h.N.mixer.Wqkv [3 D, D]: all of q, all of k, all of v

All of them rotate half-split, so only rows change places. Bunny's head has no bias (0), though transformers' has one.
"""

from __future__ import annotations

from dataclasses import replace

from models.language.config import DecoderConfig
from models.language.phi import PhiConfig
from models.weights.families import hugging_face as hf
from models.weights.families.family import Family, Layout
from models.weights.names import Names, Part
from models.weights.settings import MOST_WIDTH, Settings

OURS = ("attention.q", "attention.k", "attention.v")
MLP = {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
NAMES = Names(
    hf.outside(hf.EMBED, "model.final_layernorm", "lm_head"), hf.LAYER,
    hf.ATTENTION | MLP | {"attention.o": "self_attn.dense"},
)  # fmt: skip
MICROSOFT = Names(
    hf.outside("transformer.embd.wte.weight", "lm_head.ln", "lm_head.linear"),
    "transformer.h.{}.",
    {"attention_norm": "ln", "attention.o": "mixer.out_proj"} | MLP | dict.fromkeys(OURS, "mixer.Wqkv"),
    {module: Part(i) for i, module in enumerate(OURS)},
)
OLD_KEYS = {  # Microsoft's -> transformers'
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads", "n_inner": "intermediate_size", "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps", "attn_pdrop": "attention_dropout",
}  # fmt: skip


def dev_names(config: DecoderConfig) -> Names:
    """The layout whose rows of q, k and v take turns, head by head."""
    return replace(
        NAMES,
        modules={**NAMES.modules, **dict.fromkeys(OURS, "self_attn.query_key_value")},
        parts={module: Part(i, head_dim=config.head_dim) for i, module in enumerate(OURS)},
    )


def config_of(settings: Settings) -> PhiConfig:
    """The numbers of a Phi's config.json in either spelling; a WeightsError for anything that our Phi does not
    compute. The head's bias is assumed: whether there is one, only the tensors say."""
    settings = settings.respelled(OLD_KEYS)
    settings.only("hidden_act", "gelu_new")
    settings.only("qk_layernorm", False)
    settings.only("embd_pdrop", 0.0)
    settings.only("attention_dropout", 0.0)
    if settings.values.get("intermediate_size") is None:  # n_inner null
        dim = settings.integer("hidden_size", most=MOST_WIDTH)
        settings = settings.with_defaults({"intermediate_size": 4 * dim})
    numbers, turn = hf.widths(settings), hf.rotation(settings, factor=0.5)
    head_dim = numbers["dim"] // numbers["num_heads"]
    channels = settings.integer("rotary_dim", most=head_dim, default=int(head_dim * turn.factor), least=0)
    return PhiConfig(
        **numbers, norm_eps=settings.real("layer_norm_eps", default=1e-5), rope_theta=turn.theta,
        rotary_dim=hf.rotary_dim(settings, head_dim, channels),
        residual_dropout=settings.share("resid_pdrop"),
    )  # fmt: skip


def settings_of(config: DecoderConfig) -> dict[str, object]:
    """The config.json that transformers reads; its Phi always has a bias in the head."""
    return hf.written(config, "phi", "PhiForCausalLM") | {
        "hidden_act": "gelu_new", "layer_norm_eps": config.norm_eps, "resid_pdrop": config.residual_dropout,
        "partial_rotary_factor": hf.partial_rotary_factor(config), "qk_layernorm": False,
    }  # fmt: skip


FAMILY = Family(
    name="phi",
    model_types=frozenset(("phi", "phi-msft", "bunny-phi", "imp")),
    config_of=config_of,
    settings_of=settings_of,
    layouts=(
        Layout(("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.dense.weight"), lambda _: NAMES),
        Layout(("model.layers.0.self_attn.query_key_value.weight",), dev_names),
        Layout(("transformer.h.0.mixer.Wqkv.weight",), lambda _: MICROSOFT),
    ),
)
