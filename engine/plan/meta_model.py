"""A model and a pack without contents, on the meta device: what engine/plan/accounting.py counts on.

The model is cut down to a few layers of each kind, with its widths and its storage: frozen linears in 4, 8 or 16 bits,
what trains in fp32, gradients as the optimiser keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.language.llama import LlamaConfig
from models.linear import Linear
from models.pack import Pack, Segments
from models.quantized import from_parts, part_specs
from models.vision.clip import NUM_TAPS, ClipConfig
from models.vlm import VisionLanguageModel, VLMConfig

META = torch.device("meta")
LANGUAGE_LAYERS = 3  # the first, one among its like, the last
TOWER_BLOCKS = 7  # taps behind 1, 2, 3, 4, 5, 7: the last block has another one before it, as in a deep tower


@dataclass(frozen=True, slots=True)
class Bits:
    """How frozen linears are stored: 4, 8 or 16."""

    layers: int = 4
    head: int = 16
    vision: int = 16


@dataclass(frozen=True, slots=True)
class PackShape:
    """The sizes of a pack that its cost depends on."""

    tokens: int  # T
    supervised: int  # L
    segments: int  # S
    tiles: int  # N; 0: no images
    pairs: int  # scores of causal attention: sum over segments of length^2 / 2
    longest: int = 512  # a bound on the segments, for the table of positions


def cut_down(config: VLMConfig, bits: Bits, dtype: torch.dtype) -> VisionLanguageModel:
    """The model of `config` with few layers. `dtype`: of activations and 16-bit weights."""
    language: LlamaConfig = replace(config.language, num_layers=LANGUAGE_LAYERS)
    vision: ClipConfig = replace(config.vision, num_layers=min(config.vision.num_layers, TOWER_BLOCKS))
    with META:
        model = VisionLanguageModel(replace(config, language=language, vision=vision))
    store(model, bits, dtype)
    for parameter in model.trainable().values():
        parameter.grad = torch.empty_like(parameter)
    model.train()
    return model


def store(model: VisionLanguageModel, bits: Bits, dtype: torch.dtype) -> None:
    """Gives the tensors of a model on the meta device the storage that models/placement.py would give them."""
    for part, name in ((model.language, "language"), (model.vision, "vision")):
        for path, module in list(part.named_modules()):  # before packed weights become modules too
            if "_adapter" in path:
                continue
            if isinstance(module, Linear):
                in_layer = bits.layers if name == "language" else bits.vision
                _store_linear(module, bits.head if path == "head" else in_layer)
            kept = torch.float32 if getattr(module, "keeps_fp32", False) else dtype
            for leaf, parameter in module.named_parameters(recurse=False):
                new = nn.Parameter(torch.empty(parameter.shape, dtype=kept, device=META), parameter.requires_grad)
                setattr(module, leaf, new)


def _store_linear(linear: Linear, bits: int) -> None:
    if bits == 16 or linear.weight is None:
        return
    shape = (linear.out_features, linear.in_features)
    parts = {part: _empty(dtype, *size) for part, (dtype, size) in part_specs(shape, bits).items()}
    linear.hold(from_parts(parts, shape, torch.float16))


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def pack_of(shape: PackShape, image_size: int) -> Pack:
    """A pack of this shape."""
    long, short = torch.int64, torch.int32
    return Pack(
        input_ids=_empty(long, shape.tokens),
        segments=Segments(
            cu_seqlens=_empty(short, shape.segments + 1), max_seqlen=shape.longest,
            position_ids=_empty(short, shape.tokens), router_row=_empty(short, shape.tokens),
        ),
        modality_rows=_empty(long, 2),
        tiles=_empty(torch.float32, shape.tiles, 3, image_size, image_size) if shape.tiles else None,
        tile_router=_empty(long, shape.tiles),
        image_slots=_empty(long, shape.tiles * NUM_TAPS),
        supervised=_empty(long, shape.supervised),
        labels=_empty(long, shape.supervised),
        weights=_empty(torch.float32, shape.supervised),
        num_samples=1,
    )  # fmt: skip


def pack_bytes(pack: Pack) -> int:
    """Of all tensors of a pack."""
    segments = pack.segments
    tensors = (
        pack.input_ids, segments.cu_seqlens, segments.position_ids, segments.router_row, pack.modality_rows, pack.tiles,
        pack.tile_router, pack.image_slots, pack.supervised, pack.labels, pack.weights,
    )  # fmt: skip
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def largest_group(model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Bytes of the largest group of quantised weights that are unpacked together; 0 where nothing is quantised."""
    vision = [(b.attention.q, b.attention.k, b.attention.v) for b in model.vision.blocks()]
    mlps = [(linear,) for b in model.vision.blocks() for linear in (b.mlp.up, b.mlp.down)]
    groups = [*vision, *mlps, (model.language.head,), *(g for b in model.language.blocks() for g in b.groups())]
    packed = [group for group in groups if group[0].quantized is not None]
    return max((dtype.itemsize * sum(n.in_features * n.out_features for n in group) for group in packed), default=0)
