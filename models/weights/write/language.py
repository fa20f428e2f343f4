"""A language model as transformers reads it: its names, its order of q and k, its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from models.language.config import DecoderConfig
from models.weights.families.registry import family_named
from models.weights.rope_order import is_rotated, to_half_split
from models.weights.write.entries import Entries, Entry, changed, renamed

# What a config.json says that no tensor does and that another program may need; taken over from the source's.
CARRIED = (
    "max_position_embeddings", "original_max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range", "pretraining_tp", "use_cache",
)  # fmt: skip


def language_names(entries: Entries, config: DecoderConfig) -> dict[str, Entry]:
    """`entries` (our names within the language model) under transformers' names, q and k half-split as it wants them:
    rows that come from Meta's files are re-ordered, which is exact."""
    names = family_named(config.family).layouts[0].names(config)
    return renamed(half_split(entries, config), names.of)


def half_split(entries: Entries, config: DecoderConfig) -> dict[str, Entry]:
    """`entries` with the rows of q and k in transformers' order."""
    if not config.rope_interleaved:
        return dict(entries)
    reorder = partial(to_half_split, head_dim=config.head_dim, rotary_dim=config.rotary_dim)
    return {name: changed(e, reorder) if is_rotated(name) else e for name, e in entries.items()}


def language_settings(config: DecoderConfig, said: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """config.json of the language model alone. `said`: what the config.json of the source says, empty where it has
    none (Meta's files); positions are then those that LLaMA was published with."""
    settings = family_named(config.family).settings_of(config)
    carried = {key: said[key] for key in CARRIED if said.get(key) is not None}
    return settings | {"max_position_embeddings": positions(config)} | carried | {"torch_dtype": dtype_name(dtype)}


def guesses(config: DecoderConfig, said: Mapping[str, object]) -> list[str]:
    """What `language_settings` writes that no file says, a sentence each."""
    if said.get("max_position_embeddings") is not None:
        return []
    return [
        f"max_position_embeddings is {positions(config)}, which no file says: that of the LLaMA with rope_theta "
        f"{config.rope_theta:g} and rms_norm_eps {config.norm_eps:g}; correct it in config.json if this is another"
    ]


def positions(config: DecoderConfig) -> int:
    """The longest text of the LLaMA that has these numbers: version 3 has theta 5e5, version 1 an epsilon of 1e-6."""
    if config.rope_theta > 10_000:
        return 8192
    return 2048 if config.norm_eps < 5e-6 else 4096


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as config.json has it."""
    return str(dtype).removeprefix("torch.")
