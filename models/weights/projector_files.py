"""Projectors as LLaVA, Bunny and Imp write them: mm_projector.bin and non_lora_trainables.bin. (Written by
models/weights/write/adapters.py; the names of each kind: projector_names.py.)

    model.mm_projector. ...                        LLaVA, Bunny, Imp
    (base_model.model.)model.mm_projector. ...     the same; Imp v1 has transformer. for model.
    multi_modal_projector. ...                     transformers

Whatever stands before `mm_projector.` is dropped, as LLaVA does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.projector import ProjectorConfig, make_projector
from models.projectors.config import GROUP, GROUPED
from models.weights.archive import Archive, Shape, open_archive
from models.weights.errors import WeightsError
from models.weights.names import check_shapes, shapes_of
from models.weights.projector_names import BUNNY, our_projector_name, projector_kind, their_projector_name
from models.weights.split import PartView
from models.weights.view import FileView

FILES = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")
PROJECTOR = re.compile(r"(?:.*\.)?(?:mm_projector|multi_modal_projector)\.(.+)")
TOWER = re.compile(r"(?:.*\.)?vision_tower\.(.+)")  # the last one: LLaVA's tower stands in a tower
NEWLINE = re.compile(r"(?:.*\.)?image_newline")


@dataclass(frozen=True, kw_only=True)
class ProjectorFile:
    """What a file beside a language model holds, in its dtype; all but a tower is in memory."""

    path: Path
    kind: str  # as ProjectorConfig's; identity, where the file has no projector
    tensors: Mapping[str, Tensor]  # our names: layers.0.weight
    image_newline: Tensor | None  # [D]
    tower: PartView | None  # by the names within the tower: vision_model.pre_layrnorm.weight; not read yet


def read_projector(path: str | Path, said: str = "") -> ProjectorFile:
    """The projector in `path`, a file or a folder with one. `said`: the kind that somebody named, which tells those
    apart that have the same tensors.

    Raises:
        WeightsError: there is no such file, it is damaged or wants more than tensors, its projector is of no known
            kind, or it holds something else that was trained (all listed).
    """
    path = _file(Path(path))
    archive = open_archive(path)
    leaves, tower, extra = {}, {}, []
    newline = None
    for name in archive.shapes:
        if match := PROJECTOR.fullmatch(name):
            leaves[match[1]] = name
        elif match := TOWER.fullmatch(name):
            tower[match[1]] = name
        elif NEWLINE.fullmatch(name):
            newline = name
        else:
            extra.append(name)
    if extra:
        raise WeightsError(
            path, "holds trained tensors that are no projector's, no image_newline and no vision tower's", extra=extra,
            do="merge the checkpoint with its own project first, and name the result",
        )  # fmt: skip
    found = _kind(path, leaves, said)
    check_projector(path, archive.shapes, leaves, found)
    return ProjectorFile(
        path=path, kind=found, image_newline=_read(archive, newline),
        tensors={our_projector_name(leaf, found): archive.fetch(name).clone() for leaf, name in leaves.items()},
        tower=_tower(path, tower) if tower else None,
    )  # fmt: skip


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in FILES if (path / name).exists()]
    if not found:
        raise WeightsError(path, f"holds none of {', '.join(FILES)}", do="name the projector's file")
    return found[0]


def _tower(path: Path, names: Mapping[str, str]) -> PartView:
    prefixes = {name.removesuffix(inner) for inner, name in names.items()}
    return PartView(FileView(partial(open_archive, path)), names, [(prefix, "") for prefix in prefixes])


def _kind(path: Path, leaves: Iterable[str], said: str) -> str:
    try:
        return projector_kind(leaves, said)
    except ValueError as error:
        raise WeightsError(path, str(error)) from error


def check_projector(
    where: Path, shapes: Mapping[str, Shape], leaves: Mapping[str, str], kind: str, *, takes: int | None = None,
    gives: int | None = None,
) -> None:  # fmt: skip
    """Whether the tensors of a projector fit together.

    Args:
        shapes: by the file's names.
        leaves: what `projector_kind` reads -> the file's name.
        takes: the tower's width, `gives` the language model's; None: not known.

    Raises:
        WeightsError: those that do not fit, listed.
    """
    if kind not in BUNNY:
        _check_chain(where, shapes, leaves, takes, gives)
        return
    first = next(leaf for leaf in ("linear_1.weight", "linear.weight", "model.mlp.1.weight") if leaf in leaves)
    shape = shapes[leaves[first]]
    if len(shape) != 2:
        raise WeightsError(where, f"is no {kind} projector", mismatched=[f"{leaves[first]}: got {shape}, no matrix"])
    takes, gives = takes or shape[1] // (GROUP if kind in GROUPED else 1), gives or shape[0]
    try:
        with torch.device("meta"):
            ours = shapes_of(make_projector(ProjectorConfig(kind=kind), takes, gives))
    except ValueError as error:
        raise WeightsError(where, str(error)) from error
    expected = {leaves[their_projector_name(name, kind)]: wanted for name, wanted in ours.items()}
    check_shapes(where, {name: shapes[name] for name in leaves.values()}, expected)


def _check_chain(
    where: Path, shapes: Mapping[str, Shape], leaves: Mapping[str, str], takes: int | None, gives: int | None
) -> None:
    """Whether weights are matrices [out, in], biases vectors [out], and each takes what the one before it gives."""
    width = takes
    mismatched = []
    for leaf in sorted((leaf for leaf in leaves if leaf.endswith("weight")), key=lambda leaf: (len(leaf), leaf)):
        weight, bias = (shapes[leaves[leaf.removesuffix("weight") + part]] for part in ("weight", "bias"))
        if len(weight) != 2 or bias != weight[:1] or width not in (None, weight[-1]):
            mismatched.append(f"{leaves[leaf]}: got {weight} and a bias of {bias}, after a width of {width}")
        width = weight[0] if weight else None
    if gives is not None and leaves and width != gives and not mismatched:
        mismatched.append(f"it ends in a width of {width}, and the language model has {gives}")
    if mismatched:
        raise WeightsError(where, "its projector is no chain of linear layers from tower to language model",
                           mismatched=mismatched)  # fmt: skip


def _read(archive: Archive, name: str | None) -> Tensor | None:
    return None if name is None else archive.fetch(name).clone()
