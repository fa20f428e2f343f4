"""Which files of a Hugging Face folder hold its tensors: one file, or shards with an index; safetensors first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from models.weights.archive import Archive, Shape, open_archive
from models.weights.errors import WeightsError
from models.weights.settings import read_settings

SINGLE = ("model.safetensors", "pytorch_model.bin")


class HfTensors:
    """The tensors of several files as one. One file at a time is open, for the sake of those that cannot be mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.shapes: dict[str, Shape] = {}  # in the order of the files
        self.sizes: dict[str, int] = {}  # bytes
        self.file_of: dict[str, Path] = {}
        self._open: Archive | None = None
        for path in self.files:
            archive = self._archive(path)
            for name, shape in archive.shapes.items():
                if name in self.shapes:
                    raise WeightsError(path, f"{name} is also in {self.file_of[name].name}")
                self.shapes[name] = shape
                self.sizes[name] = archive.sizes[name]
                self.file_of[name] = path
            del archive  # with a file that cannot be mapped, before the next one comes

    def fetch(self, name: str) -> Tensor:
        """One tensor in its file's dtype."""
        return self._archive(self.file_of[name]).fetch(name)

    def read(self, name: str) -> Tensor:
        """One tensor in any dtype."""
        return self._archive(self.file_of[name]).read(name)

    def release(self, name: str) -> None:
        """Lets go of the mapped pages of one tensor."""
        self._archive(self.file_of[name]).release(name)

    def close(self) -> None:
        """Forgets the open file until somebody fetches from it."""
        self._open = None

    def _archive(self, path: Path) -> Archive:
        if self._open is None or self._open.path != path:
            self._open = None  # gone before the next one comes
            self._open = open_archive(path)
        return self._open


def has_tensors(folder: Path) -> bool:
    """Whether `folder` has the tensors of a model, or an index of them."""
    return any((folder / name).exists() for single in SINGLE for name in (single, f"{single}.index.json"))


def open_folder(folder: Path) -> HfTensors:
    """The tensors of `folder`, each where its index says.

    Raises:
        WeightsError: as `tensor_files`, or the index and the shards do not agree.
    """
    tensors = HfTensors(tensor_files(folder))
    index = _index(folder)
    if index is not None:
        said = _weight_map(index)
        elsewhere = [
            f"{name}: got {tensors.file_of[name].name}, the index says {file}"
            for name, file in said.items()
            if name in tensors.file_of and tensors.file_of[name].name != file
        ]
        gone = [name for name in said if name not in tensors.file_of]
        if gone or elsewhere:
            raise WeightsError(index, "the index and the shards do not agree", missing=gone, mismatched=elsewhere,
                               do="get all files again, from one revision")  # fmt: skip
    return tensors


def tensor_files(folder: Path) -> list[Path]:
    """The files with the tensors of `folder`.

    Raises:
        WeightsError: there are none, or a shard that the index names is not there.
    """
    index = _index(folder)
    if index is not None:
        return _indexed(index)
    for single in SINGLE:
        if (folder / single).exists():
            return [folder / single]
    raise WeightsError(
        folder, f"has none of {', '.join(SINGLE)} and no index of shards",
        do="download the weights, not only the configuration (with Git LFS: git lfs pull)",
    )  # fmt: skip


def _index(folder: Path) -> Path | None:
    """The index of shards that counts: there is none, or a file of the same format holds all tensors alone."""
    for single in SINGLE:
        if (folder / single).exists():
            return None
        if (index := folder / f"{single}.index.json").exists():
            return index
    return None


def _weight_map(index: Path) -> dict[str, str]:
    names = read_settings(index).inner("weight_map")
    if names is None or not names.values:
        raise WeightsError(index, "has no weight_map")
    return {name: str(file) for name, file in names.values.items()}


def _indexed(index: Path) -> list[Path]:
    files = sorted(set(_weight_map(index).values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise WeightsError(index, f"names {outside[0]!r}; a shard stands beside its index")
    gone = [file for file in files if not (index.parent / file).exists()]
    if gone:
        raise WeightsError(
            index, f"{len(gone)} of {len(files)} shards are not there", missing=gone, do="download or copy them too"
        )
    return [index.parent / file for file in files]
