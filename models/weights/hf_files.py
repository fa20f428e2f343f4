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
        self._file_of: dict[str, Path] = {}
        self._open: Archive | None = None
        for path in self.files:
            archive = self._archive(path)
            for name, shape in archive.shapes.items():
                if name in self.shapes:
                    raise WeightsError(path, f"{name} is also in {self._file_of[name].name}")
                self.shapes[name] = shape
                self.sizes[name] = archive.sizes[name]
                self._file_of[name] = path
            del archive  # with a file that cannot be mapped, before the next one comes

    def fetch(self, name: str) -> Tensor:
        """One tensor in its file's dtype."""
        return self._archive(self._file_of[name]).fetch(name)

    def release(self, name: str) -> None:
        """Lets go of the mapped pages of one tensor."""
        self._archive(self._file_of[name]).release(name)

    def close(self) -> None:
        """Forgets the open file until somebody fetches from it."""
        self._open = None

    def _archive(self, path: Path) -> Archive:
        if self._open is None or self._open.path != path:
            self._open = None  # gone before the next one comes
            self._open = open_archive(path)
        return self._open


def tensor_files(folder: Path) -> list[Path]:
    """The files with the tensors of `folder`.

    Raises:
        WeightsError: there are none, or a shard that the index names is not there.
    """
    for single in SINGLE:
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            return _indexed(index)
    raise WeightsError(
        folder, f"has none of {', '.join(SINGLE)} and no index of shards",
        do="download the weights, not only the configuration (with Git LFS: git lfs pull)",
    )  # fmt: skip


def _indexed(index: Path) -> list[Path]:
    names = read_settings(index).inner("weight_map")
    if names is None or not names.values:
        raise WeightsError(index, "has no weight_map")
    files = sorted({str(file) for file in names.values.values()})
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise WeightsError(index, f"names {outside[0]!r}; a shard stands beside its index")
    gone = [file for file in files if not (index.parent / file).exists()]
    if gone:
        raise WeightsError(index, f"{len(gone)} of {len(files)} shards are not there: {', '.join(gone[:4])}")
    return [index.parent / file for file in files]
