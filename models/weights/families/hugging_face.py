"""What Hugging Face's files of several families share: names of tensors, and keys of config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from models.language.config import DecoderConfig
from models.weights.errors import WeightsError
from models.weights.settings import MOST_LAYERS, MOST_VOCABULARY, MOST_WIDTH, Settings

EMBED = "model.embed_tokens.weight"
LAYER = "model.layers.{}."
ATTENTION = {
    "attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
}  # fmt: skip
MLP = {
    "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip


def outside(embed: str, norm: str, head: str) -> dict[str, str]:
    """The names outside of the layers, with those of biases: they are only looked up where the model has them."""
    both = {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in (("norm", norm), ("head", head))
            for leaf in ("weight", "bias")}  # fmt: skip
    return {"embed.weight": embed} | both


def widths(settings: Settings) -> dict[str, Any]:
    """vocab_size, dim, num_layers, num_heads, num_kv_heads and ffn_dim in transformers' spelling, as they are; a
    WeightsError where they make no model."""
    dim = settings.integer("hidden_size", most=MOST_WIDTH)
    heads = settings.integer("num_attention_heads", most=dim)
    kv_heads = settings.integer("num_key_value_heads", most=heads, default=heads)
    if dim % (2 * heads) or heads % kv_heads:
        raise WeightsError(
            settings.path,
            f"hidden_size {dim}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not divide",
        )
    settings.only("head_dim", dim // heads)
    return {
        "vocab_size": settings.integer("vocab_size", most=MOST_VOCABULARY), "dim": dim,
        "num_layers": settings.integer("num_hidden_layers", most=MOST_LAYERS), "num_heads": heads,
        "num_kv_heads": kv_heads, "ffn_dim": settings.integer("intermediate_size", most=MOST_WIDTH),
    }  # fmt: skip


def written(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, object]:
    """The same as transformers writes it, with the rotation in the keys that every version of it reads."""
    return {
        "architectures": [architecture], "model_type": model_type, "vocab_size": config.vocab_size,
        "hidden_size": config.dim, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "intermediate_size": config.ffn_dim,
        "rope_theta": config.rope_theta, "tie_word_embeddings": False,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rotation:
    """RoPE: its base, and the share of a head's channels that turns."""

    theta: float
    factor: float


def rotation(settings: Settings, *, factor: float = 1.0) -> Rotation:
    """transformers 5 writes rope_parameters, older ones rope_theta, partial_rotary_factor and rope_scaling, the first
    ones nothing. `factor` is the family's default. A WeightsError where positions are scaled."""
    theta = settings.real("rope_theta", default=10000.0)
    factor = settings.real("partial_rotary_factor", default=factor)
    for key in ("rope_parameters", "rope_scaling"):
        rope = settings.inner(key)
        if rope is not None:
            rope.only("rope_type", "default")
            rope.only("type", "default")
            theta = rope.real("rope_theta", default=theta)
            factor = rope.real("partial_rotary_factor", default=factor)
    if factor > 1:
        raise WeightsError(settings.path, f"partial_rotary_factor is {factor}; at most 1 of a head can turn")
    return Rotation(theta, factor)


def rotary_dim(settings: Settings, head_dim: int, channels: float) -> int | None:
    """Channels of a head that turn, None for all; rounded down as transformers does."""
    if channels < 2 or int(channels) % 2:
        raise WeightsError(
            settings.path, f"{int(channels)} of a head's {head_dim} channels turn, by its partial_rotary_factor; "
            "pairs of them do"
        )  # fmt: skip
    return None if int(channels) == head_dim else int(channels)


def partial_rotary_factor(config: DecoderConfig) -> float:
    """The share of a head's channels that turns, such that rounding down their number gives it again: 44 times 30 / 44
    is less than 30 in floating point."""
    factor = config.rotary / config.head_dim
    return factor if int(config.head_dim * factor) == config.rotary else math.nextafter(factor, 1.0)
