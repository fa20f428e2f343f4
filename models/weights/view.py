"""Tensors by name, wherever they lie: the files of a folder, one file, or a part of a larger checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.quantized import Packed
from models.weights.archive import Archive, Reopened, Shape


class Weights(Protocol):
    """Names with shapes and bytes, and one weight at a time: 16- or 32-bit floats, or quantized in the file."""

    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    def fetch(self, name: str, /) -> Tensor | Packed: ...
    def release(self, name: str, /) -> None: ...
    def close(self) -> None: ...


class Tensors(Weights, Protocol):
    """What HfTensors, a FileView and a Renamed have in common: the tensors as they are in the files. `read` gives one
    in any dtype, `fetch` refuses what is no 16- or 32-bit float."""

    def fetch(self, name: str, /) -> Tensor: ...
    def read(self, name: str, /) -> Tensor: ...


class FileView:
    """The tensors of one file, opened by `open_file` and again after close()."""

    def __init__(self, open_file: Callable[[], Archive]) -> None:
        self._file = Reopened(open_file)
        archive = self._file()
        self.files = (archive.path,)
        self.shapes = archive.shapes
        self.sizes = archive.sizes

    def fetch(self, name: str) -> Tensor:
        return self._file().fetch(name)

    def read(self, name: str) -> Tensor:
        return self._file().read(name)

    def release(self, name: str) -> None:
        self._file().release(name)

    def close(self) -> None:
        self._file.close()


class Renamed:
    """Some tensors of others, under other names: `names` says for each name here the name there."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = names
        self.files = tensors.files
        self.shapes = {here: tensors.shapes[there] for here, there in names.items()}
        self.sizes = {here: tensors.sizes[there] for here, there in names.items()}

    def fetch(self, name: str) -> Tensor:
        return self._tensors.fetch(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self._names[name])

    def release(self, name: str) -> None:
        self._tensors.release(self._names[name])

    def close(self) -> None:
        self._tensors.close()
