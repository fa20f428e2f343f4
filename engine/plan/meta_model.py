"""A model and a pack without contents, on the meta device: what engine/plan/accounting.py counts on.

The model is cut down to a few layers of each kind, with its widths and its storage: frozen linears in 4, 8 or 16 bits,
what trains in fp32, gradients as the optimiser keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.data.packing import LAVIN
from engine.data.planning import MODALITY_ROWS
from models.adapters.names import is_adapter
from models.linear import Linear
from models.pack import Pack, Segments, named_tensors
from models.quantized import from_parts, part_specs
from models.vision.tower import TowerConfig
from models.vlm import Part, VisionLanguageModel, VLMConfig

META = torch.device("meta")
LAYERS = 3  # the first, one among its like, the last
LORA_LAYERS = 4  # below the first update nothing learns, so the second layer keeps other things than those behind it
TAPPED_BLOCKS = 7  # taps behind 1, 2, 3, 4, 5, 7: the last block has another one before it, as in a deep tower


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
    slots: int | None = None  # I, where embeddings are gathered; None: those of all tiles, in order
    image_tokens: int = LAVIN.tile_tokens  # of an image, all its tiles together
    image_tiles: int = 1


def cut_down(config: VLMConfig, bits: Bits, dtype: torch.dtype) -> VisionLanguageModel:
    """The model of `config` with few layers. `dtype`: of activations and 16-bit weights."""
    language = replace(config.language, num_layers=_few(config.train_language))
    vision = _few_blocks(config.vision, _few(config.train_vision))
    with META:
        model = VisionLanguageModel(replace(config, language=language, vision=vision))
    store(model, bits, dtype)
    for parameter in model.trainable().values():
        parameter.grad = torch.empty_like(parameter)
    model.train()
    return model


def _few(part: Part) -> int:
    return LORA_LAYERS if part == "lora" else LAYERS


def _few_blocks(config: TowerConfig, number: int) -> TowerConfig:
    if config.select_feature == "class_tokens":
        return replace(config, num_layers=min(config.num_layers, TAPPED_BLOCKS))
    return replace(config, num_layers=number, select_layer=number)


def store(model: VisionLanguageModel, bits: Bits, dtype: torch.dtype) -> None:
    """Gives the tensors of a model on the meta device the storage that models/placement.py would give them."""
    for part, name in ((model.language, "language"), (model.vision, "vision")):
        for path, module in list(part.named_modules()):  # before packed weights become modules too
            if is_adapter(f"{path}."):
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


def pack_of(shape: PackShape, config: VLMConfig) -> Pack:
    """A pack of this shape, for the model of `config`."""
    long, short = torch.int64, torch.int32
    size, slots = config.vision.picture_size, shape.tiles * config.tokens_per_tile
    gathered = shape.slots is not None and shape.tiles > 0
    return Pack(
        input_ids=_empty(long, shape.tokens),
        segments=Segments(
            cu_seqlens=_empty(short, shape.segments + 1), max_seqlen=shape.longest,
            position_ids=_empty(short, shape.tokens), router_row=_empty(short, shape.tokens),
        ),
        modality_rows=_empty(long, MODALITY_ROWS if config.has_modality_token else 0),
        tiles=_empty(torch.float32, shape.tiles, 3, size, size) if shape.tiles else None,
        tile_router=_empty(long, shape.tiles),
        image_slots=_empty(long, (shape.slots or 0) if gathered else slots),
        image_rows=_empty(long, shape.slots or 0) if gathered else None,
        supervised=_empty(long, shape.supervised),
        labels=_empty(long, shape.supervised),
        weights=_empty(torch.float32, shape.supervised),
        num_samples=1,
    )  # fmt: skip


def pack_bytes(pack: Pack) -> int:
    """Of all tensors of a pack."""
    return sum(tensor.nbytes for tensor in named_tensors(pack).values())


def largest_group(model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Bytes of the largest group of quantised weights that are unpacked together; 0 where nothing is quantised."""
    groups = [group for block in model.vision.blocks() for group in block.groups()]
    groups += [group for block in model.language.blocks() for group in block.groups()]
    groups.append((model.language.head,))
    return _largest((group for group in groups if group[0].quantized is not None), dtype)


def largest_tower_group(model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Bytes of the largest group of the tower's, were they quantised."""
    return _largest((group for block in model.vision.blocks()[:1] for group in block.groups()), dtype)


def _largest(groups: Iterable[tuple[Linear, ...]], dtype: torch.dtype) -> int:
    return max((dtype.itemsize * sum(n.in_features * n.out_features for n in group) for group in groups), default=0)
