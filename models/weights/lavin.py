"""LaVIN's adapter checkpoints (checkpoint-19.pth): their names and shapes on disk, ours in memory.

On disk adapters are 1x1 convolutions: conv_A [h, D, 1], conv_B and conv_D [D, h/2, 1]; ours are matrices. Every name
begins with `module.` where a file was saved under torchrun. The router's temperature is in `args`, not in a tensor.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.weights.archive import Archive, Shape, archive_of, read_pickle
from models.weights.errors import WeightsError
from models.weights.names import check_shapes
from models.weights.whole import whole

WRAPPER = "module."
OUTSIDE = {
    "modality_embedding.weight": "adapter_modality_embedding.weight",
    "projector.fc1.weight": "adapter_proj.conv_A.weight",
    "projector.fc1.bias": "adapter_proj.conv_A.bias",
    "projector.fc2.weight": "adapter_proj.conv_B.weight",
    "projector.fc2.bias": "adapter_proj.conv_B.bias",
}
LAYERS = {"language": "layers", "vision": "backbone.visual.transformer.resblocks"}
PLACES = {"attention": "adapter_attn", "mlp": "adapter_mlp"}
PARTS = {"down": "conv_A", "up0": "conv_B", "up1": "conv_D", "router": "expert_weights"}
ADAPTER = re.compile(r"(language|vision)\.layers\.(\d+)\.(attention|mlp)_adapter\.(down|up0|up1|router)\.(weight|bias)")


def read_lavin_adapters(path: str | Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The adapters, projector and modality embedding in `path`, under our names, in the file's dtype, in memory.

    Args:
        path: one of LaVIN's checkpoints, saved with or without torchrun.
        expected: each of our names (`vision.layers.3.attention_adapter.up0.weight`) with its shape in the model.

    Raises:
        WeightsError: the file is damaged or not LaVIN's, or tensors are missing, unknown or of another shape (listed by
            their names on disk).
    """
    path = Path(path)
    archive = _model(path, _checkpoint(path))
    on_disk = {name: _disk_name(name, path) for name in expected}
    wanted = {theirs: _disk_shape(name, tuple(expected[name])) for name, theirs in on_disk.items()}
    check_shapes(
        path, archive.shapes, wanted,
        do="--model, --adapter.dim, --adapter.language and --adapter.vision must be those of the training run",
    )  # fmt: skip
    return {name: archive.fetch(on_disk[name]).reshape(tuple(expected[name])).clone() for name in expected}


def read_lavin_args(path: str | Path) -> dict[str, object]:
    """The command line that wrote `path` (adapter_dim, adapter_scale, temperature, ...); empty where it has none."""
    args = _checkpoint(Path(path)).get("args")
    if args is None:
        return {}
    values = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(values, dict):
        raise WeightsError(path, f"its args are a {type(args).__name__}; expected a Namespace or a dict")
    return {str(key): value for key, value in values.items()}


def write_lavin_adapters(
    path: str | Path, tensors: Mapping[str, Tensor], *, epoch: int, args: Mapping[str, object], module_prefix: bool,
) -> None:  # fmt: skip
    """Writes `tensors` (our names) as LaVIN's next command reads them: {"model", "epoch", "args"}, tensors in fp32.

    `args` holds numbers, strings, None, and lists and dicts of them, so that the file opens with weights_only=True.
    The file is whole or absent: it is written beside its place, synced, and renamed.

    Raises:
        ValueError: a name has no place in LaVIN's layout, or a value of `args` is not plain.
    """
    path = Path(path)
    prefix = WRAPPER if module_prefix else ""
    model = {prefix + _disk_name(name, path): _to_disk(name, tensor) for name, tensor in tensors.items()}
    content = {"model": model, "epoch": int(epoch), "args": _plain(dict(args))}
    with whole(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _checkpoint(path: Path) -> dict[object, object]:
    values = read_pickle(path, allowed=(argparse.Namespace,))
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise WeightsError(path, "is not one of LaVIN's checkpoints: it has no 'model' with the adapters")
    return values


def _model(path: Path, checkpoint: dict[object, object]) -> Archive:
    model = checkpoint["model"]
    assert isinstance(model, dict)
    bare = {str(name).removeprefix(WRAPPER): tensor for name, tensor in model.items()}
    if len(bare) != len(model):
        raise WeightsError(path, f"holds tensors both with and without '{WRAPPER}'")
    return archive_of(path, bare)


def _disk_name(name: str, path: Path) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = ADAPTER.fullmatch(name)
    if match is None:
        raise WeightsError(path, f"{name} has no place in LaVIN's checkpoints")
    model, index, place, part, leaf = match.groups()
    return f"{LAYERS[model]}.{index}.{PLACES[place]}.{PARTS[part]}.{leaf}"


def _is_convolution(name: str) -> bool:
    return name.endswith((".down.weight", ".up0.weight", ".up1.weight"))


def _disk_shape(name: str, shape: Shape) -> Shape:
    return (*shape, 1) if _is_convolution(name) else shape


def _to_disk(name: str, tensor: Tensor) -> Tensor:
    """An own fp32 copy: a view would take its whole storage into the file."""
    tensor = tensor.detach().to("cpu", torch.float32, copy=True)
    return tensor.unsqueeze(-1) if _is_convolution(name) else tensor


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    raise ValueError(f"args hold a {type(value).__name__}; a checkpoint takes numbers, strings, None, lists and dicts")
