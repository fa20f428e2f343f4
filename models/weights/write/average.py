"""The weighted average of checkpoints of one shape.

    out = w_1 x_1 + w_2 x_2 + ... + w_n x_n

tensor by tensor, in the order given: each product and each sum is rounded to fp32, the result once more to the dtype
that the last checkpoint has it in. Bunny-v1.0-4B is 0.3 R1 + 0.7 R2 (over its language model, projector and tower) with
the config.json and tokenizer of R2. Tensors of integers must be the same in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.weights.archive import DTYPES, Archive, open_archive
from models.weights.errors import WeightsError
from models.weights.hf_files import has_tensors, tensor_files
from models.weights.lora_settings import CONFIG_NAME
from models.weights.names import check_shapes
from models.weights.write.entries import Entry

Places = dict[str, Archive]  # which file has each tensor


def average(folders: Sequence[Path], weights: Sequence[float], dtype: torch.dtype | None = None) -> dict[str, Entry]:
    """The tensors of the average of `folders` in `dtype` (None: each in the last folder's), in the last one's order.
    No weight is read yet.

    Raises:
        WeightsError: a file is missing or damaged, or names, shapes or kinds of numbers differ (all listed).
        ValueError: not one weight for each folder.
    """
    if not folders or len(folders) != len(weights):
        raise ValueError(f"{len(folders)} folders and {len(weights)} weights")
    places = [_places(folder) for folder in folders]
    shapes = [{name: archive.shapes[name] for name, archive in place.items()} for place in places]
    for folder, found in zip(folders, shapes, strict=True):
        check_shapes(
            folder, found, shapes[-1],
            do=f"average checkpoints of one architecture and format; the last is {folders[-1]}",
        )  # fmt: skip
    last = places[-1]
    out = {}
    for name, shape in shapes[-1].items():
        own = last[name].read(name).dtype
        # A mapped file's tensor costs nothing until it is read; `partial` binds this turn's name.
        read = partial(_sum if own in DTYPES else _same, name, places, list(weights), list(folders))
        out[name] = Entry(shape, dtype if dtype and own in DTYPES else own, read, partial(_release, name, places))
    return out


def _places(folder: Path) -> Places:
    if (folder / CONFIG_NAME).is_file() or not has_tensors(folder):
        raise WeightsError(
            folder, "holds no whole model in shards" if folder.is_dir() else "is not there",
            do="average whole models: merge a LoRA into its base first",
        )  # fmt: skip
    places: Places = {}
    for path in tensor_files(folder):
        archive = open_archive(path)
        for name in archive.shapes:
            if name in places:
                raise WeightsError(path, f"{name} is also in {places[name].path.name}")
            places[name] = archive
    return places


def _sum(name: str, places: list[Places], weights: list[float], folders: list[Path]) -> Tensor:
    total: Tensor | None = None
    for place, weight, folder in zip(places, weights, folders, strict=True):
        tensor = place[name].read(name)
        if tensor.dtype not in DTYPES:
            raise WeightsError(folder, f"{name} is {_text(tensor)}; the last checkpoint has floating point numbers")
        part = tensor.to(torch.float32) * weight
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _same(name: str, places: list[Places], weights: list[float], folders: list[Path]) -> Tensor:
    last = places[-1][name].read(name)
    for place, folder in zip(places, folders, strict=True):
        tensor = place[name].read(name)
        if tensor.dtype != last.dtype or not torch.equal(tensor, last):
            raise WeightsError(
                folder, f"{name} holds {_text(last)}, which have no average, and differs from {folders[-1]}",
                do="average checkpoints whose tensors of integers are the same",
            )  # fmt: skip
    return last


def _release(name: str, places: list[Places]) -> None:
    for place in places:
        place[name].release(name)


def _text(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
