"""EVA02-CLIP: BAAI's .pt files (`visual.*` beside a text model), and the tower inside Bunny's checkpoints (`model.*`).

The files have no settings: every number is in a shape. Only blocks with inner norms are known, EVA-02's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.vision.eva import EvaConfig
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.names import Names
from models.weights.towers.family import Family
from models.weights.towers.layout import Layout, count_blocks
from models.weights.towers.selection import make_config

PREFIXES = ("visual.", "model.", "")
HEAD_DIM = 64  # of every EVA02-CLIP
UNUSED = r"model.\g<0>"  # exports have the names of Bunny's checkpoints
OUTER = ("model", "module", "state_dict")  # keys under which a .pt file may hold its tensors

EVA = Layout(
    names=Names(
        outside={
            "patch_embed.weight": "patch_embed.proj.weight", "patch_embed.bias": "patch_embed.proj.bias",
            "class_embedding": "cls_token", "position_embedding": "pos_embed",
        },
        layer="blocks.{}.",
        modules={
            "attention_norm": "norm1", "attention.q": "attn.q_proj", "attention.k": "attn.k_proj",
            "attention.v": "attn.v_proj", "attention.inner_norm": "attn.inner_attn_ln", "attention.o": "attn.proj",
            "mlp_norm": "norm2", "mlp.gate": "mlp.w1", "mlp.up": "mlp.w2", "mlp.inner_norm": "mlp.ffn_ln",
            "mlp.down": "mlp.w3",
        },
    ),
    leaves={"attention.q.bias": "attn.q_bias", "attention.v.bias": "attn.v_bias"},
    unused={
        r"(norm|head)\.(weight|bias)": UNUSED,
        r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)": UNUSED,  # tables, which follow from the grid
    },
    foreign=r"text\..+|logit_scale",
    leading={"class_embedding": (1, 1), "position_embedding": (1,)},
)  # fmt: skip
EXPORT = replace(EVA, prefix="model.")
FAMILY = Family(config=EvaConfig, export=EXPORT)


def eva_config(where: Path, shapes: Mapping[str, Shape], layout: Layout, **selection: Any) -> EvaConfig:
    """The tower whose tensors have these shapes.

    Raises:
        WeightsError: they make no tower of square tiles.
    """
    ours = ("patch_embed.weight", "position_embedding", "layers.0.mlp.gate.weight")
    names = [layout.of(name) for name in ours]
    missing = [name for name in names if name not in shapes]
    if missing:
        raise WeightsError(where, "is an EVA tower of another kind: EVA02-CLIP has a SwiGLU", missing=missing)
    patches, positions, gate = (shapes[name] for name in names)
    side = math.isqrt(max(positions[1] - 1, 0)) if len(positions) == 3 else 0
    if len(patches) != 4 or len(gate) != 2 or positions != (1, side * side + 1, patches[0]):
        found = [f"{name}: {shapes[name]}" for name in names]
        raise WeightsError(where, "has no vision transformer of square tiles", mismatched=found)
    numbers = {
        "width": patches[0], "num_layers": count_blocks(shapes, layout), "num_heads": patches[0] // HEAD_DIM,
        "patch_size": patches[-1], "image_size": side * patches[-1], "mlp_dim": gate[0],
    }  # fmt: skip
    return make_config(EvaConfig, where, numbers | selection)
