"""adapter_config.json: what PEFT says of a LoRA, and what of it we compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from models.adapters.lora import LoRAConfig
from models.weights.errors import WeightsError
from models.weights.settings import MOST_WIDTH, Settings

CONFIG_NAME = "adapter_config.json"

# Settings that change what is computed, or which weights it is added to, with the values at which they do not. Absent
# ones, null, false and empty ones are accepted too.
PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # pissa, olora, corda, loftq change the base as well
    **dict.fromkeys(
        (
            "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern",
            "alpha_pattern", "layer_replication", "layers_to_transform", "exclude_modules", "trainable_token_indices",
            "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
            "monteclora_config",
        ),
        (),
    ),
}  # fmt: skip


def lora_config_of(settings: Settings, targets: Sequence[str]) -> LoRAConfig:
    """The numbers of a LoRA whose tensors are on `targets` (our names).

    Raises:
        WeightsError: a setting that changes the maths and that we do not compute, or a number out of range.
    """
    for key, accepted in PLAIN.items():
        value = settings.values.get(key)
        if value and value not in accepted:
            raise WeightsError(
                settings.path, f"{key} is {value!r}, which is not supported; LoRA is W + alpha / r B A on all layers",
                do="merge it into its base with PEFT (merge_and_unload) and name the result",
            )  # fmt: skip
    rank = settings.integer("r", most=MOST_WIDTH)
    alpha = settings.real("lora_alpha")
    if settings.flag("use_rslora"):  # alpha / sqrt(r)
        alpha *= math.sqrt(rank)
    try:
        return LoRAConfig(rank=rank, alpha=alpha, dropout=settings.share("lora_dropout"), targets=tuple(targets))
    except ValueError as error:
        raise WeightsError(settings.path, str(error)) from error


def check_targets(settings: Settings, linears: Sequence[str], held: Sequence[str]) -> None:
    """Whether the file holds what a list of target_modules promises. PEFT takes every linear that a name of the list is
    the end of; a regular expression may be about another tree of modules, and nothing is said of it.

    Args:
        linears: every linear of the model by PEFT's names ("model.layers.0.self_attn.q_proj").
        held: those that the file has tensors for.

    Raises:
        WeightsError: linears that are named and not held, listed.
    """
    targets = settings.values.get("target_modules")
    if not isinstance(targets, list):
        return
    named = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in targets)]
    missing = [name for name in named if name not in set(held)]
    if missing:
        raise WeightsError(
            settings.path.parent, "holds no LoRA for linears that its target_modules name", missing=missing
        )


def peft_settings(config: LoRAConfig, modules: Sequence[str], base: str) -> dict[str, Any]:
    """adapter_config.json for a LoRA on `modules`, all by their whole names: a short one (q_proj) would also find the
    linears of a vision tower beside the language model."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout, "target_modules": list(modules), "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {},
    }  # fmt: skip
