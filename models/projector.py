"""What stands between tower and language model: features [M, K, W] of M tiles -> embeddings [M, K', D].

    lavin              Linear(W, hidden) - SiLU - Linear(hidden, D)                    LaVIN's neck, on six class tokens
    linear             Linear(W, D)                                                    LLaVA
    mlpNx_gelu         Linear(W, D), then N - 1 times GELU (with erf) - Linear(D, D)   LLaVA-1.5, Bunny, Imp
    identity           nothing; W is D
    sppv1, v2, v3      linear layers and a mean of 2 x 2 patches                       Bunny, a quarter of the tokens
    minigpt, vanilla   one Linear(4 W, D) of four features that follow each other      Bunny, a quarter of the tokens
    ldp                an MLP and two convolutional blocks, one of stride 2            MobileVLM, Bunny

All have biases. Parameters stay in fp32 beside 16-bit features; the products are in the features' dtype.
"""

from __future__ import annotations

from models.projectors.base import Projector
from models.projectors.config import GROUPED, MLP, SPP, ProjectorConfig
from models.projectors.ldp import LdpProjector
from models.projectors.mlp import Identity, LavinProjector, MLPProjector
from models.projectors.pooled import GroupProjector, SppProjector

__all__ = ["MLP", "Projector", "ProjectorConfig", "make_projector"]


def make_projector(config: ProjectorConfig, vision_dim: int, language_dim: int) -> Projector:
    """The projector from features of width `vision_dim` to embeddings of width `language_dim`.

    Raises:
        ValueError: an identity between two widths, or a width that this projector cannot have.
    """
    if config.kind == "lavin":
        return LavinProjector(config, vision_dim, language_dim)
    if config.kind == "identity":
        if vision_dim != language_dim:
            raise ValueError(
                f"projector identity between a tower of width {vision_dim} and a language model of width "
                f"{language_dim}: it needs equal widths; choose linear or mlp2x_gelu"
            )
        return Identity(config)
    if config.kind in SPP:
        return SppProjector(config, vision_dim, language_dim)
    if config.kind in GROUPED:
        return GroupProjector(config, vision_dim, language_dim)
    if config.kind == "ldp":
        return LdpProjector(config, vision_dim, language_dim)
    match = MLP.fullmatch(config.kind)
    return MLPProjector(config, vision_dim, language_dim, int(match[1]) if match else 1)
