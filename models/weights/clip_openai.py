"""CLIP's vision tower with OpenAI's names, from their own archive or from a file of tensors.

Their archive (ViT-L-14.pt) is a TorchScript program. Opening a program can run it, so it is opened only if it is theirs
to the last bit. q, k and v are one tensor in it, [3W, W].
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.vision.clip import ClipConfig
from models.weights.archive import Archive, Reopened, Shape, archive_of
from models.weights.errors import WeightsError
from models.weights.names import Names, check_shapes, tower_config, vision_shapes
from models.weights.source import VisionSource

SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
NAMES = Names(
    outside={
        "patch_embed.weight": "visual.conv1.weight", "class_embedding": "visual.class_embedding",
        "position_embedding": "visual.positional_embedding", "pre_norm.weight": "visual.ln_pre.weight",
        "pre_norm.bias": "visual.ln_pre.bias",
    },
    layer="visual.transformer.resblocks.{}.",
    modules={
        "attention_norm": "ln_1", "attention.o": "attn.out_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
)  # fmt: skip
PACKED = re.compile(r"layers\.(\d+)\.attention\.([qkv])\.(weight|bias)")
LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
IGNORED = re.compile(  # the text model, what follows the tower's blocks, and numbers
    r"visual\.(ln_post\..+|proj)|transformer\..+|token_embedding\.weight|positional_embedding|ln_final\..+"
    r"|text_projection|logit_scale|input_resolution|context_length|vocab_size"
)
HEAD_DIM = 64  # of every CLIP of theirs; the file does not say


def open_program(path: Path) -> Archive:
    """The tensors of OpenAI's TorchScript archive, all in memory; a WeightsError for any other program."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise WeightsError(
            path, f"is a TorchScript program with sha256 {digest}; the only one accepted is OpenAI's, {SHA256}",
            do="download ViT-L-14.pt again, or name the folder of openai/clip-vit-large-patch14 from Hugging Face",
        )  # fmt: skip
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch wishes that nobody wrote such files any more
        return archive_of(path, dict(jit.load(path, map_location="cpu").state_dict()))


def open_openai(file: Reopened) -> VisionSource:
    """The tower in `file`; a WeightsError where tensors are missing, unknown or of another shape."""
    archive = file()
    config = _config(archive)
    expected: dict[str, Shape] = {}
    for name, shape in vision_shapes(config).items():
        theirs, part = _their_name(name)
        expected[theirs] = shape if part is None else (3 * shape[0], *shape[1:])
    check_shapes(archive.path, {n: s for n, s in archive.shapes.items() if not IGNORED.fullmatch(n)}, expected)

    def fetch(name: str) -> Tensor:
        theirs, part = _their_name(name)
        tensor = file().fetch(theirs)
        return tensor if part is None else tensor.chunk(3)[part]

    def size(name: str) -> int:
        theirs, part = _their_name(name)
        return archive.sizes[theirs] // (1 if part is None else 3)

    names = tuple(vision_shapes(config))
    source = VisionSource(
        config=config, files=(archive.path,), names=names, sizes={name: size(name) for name in names}, fetch=fetch,
        release=lambda name: file().release(_their_name(name)[0]), close=file.close, allocated=lambda name: False,
    )  # fmt: skip
    source.close()  # a program cannot be mapped: not in memory while the language model is read
    return source


def _their_name(name: str) -> tuple[str, int | None]:
    """OpenAI's name, and which third of its rows is meant where q, k and v are one tensor."""
    packed = PACKED.fullmatch(name)
    if packed is None:
        return NAMES.of(name), None
    return f"{NAMES.layer.format(packed[1])}attn.in_proj_{packed[3]}", "qkv".index(packed[2])


def _config(archive: Archive) -> ClipConfig:
    """OpenAI's files have no settings: every number is in a shape."""
    names = [NAMES.of(name) for name in ("patch_embed.weight", "position_embedding", "layers.0.mlp.up.weight")]
    missing = [name for name in names if name not in archive.shapes]
    if missing:
        raise WeightsError(archive.path, "has no vision transformer (is it a ResNet?)", missing=missing)
    patches, positions, up = (archive.shapes[name] for name in names)
    side = math.isqrt(max(positions[0] - 1, 0)) if positions else 0
    if len(patches) != 4 or len(up) != 2 or positions != (side * side + 1, patches[0]):
        found = [f"{name}: {archive.shapes[name]}" for name in names]
        raise WeightsError(archive.path, "has no vision transformer of square tiles", mismatched=found)
    return tower_config(
        archive.path, width=patches[0], num_layers=len({m[1] for name in archive.shapes if (m := LAYER.match(name))}),
        num_heads=patches[0] // HEAD_DIM, patch_size=patches[-1], image_size=side * patches[-1], mlp_dim=up[0],
        norm_eps=1e-5,
    )  # fmt: skip
