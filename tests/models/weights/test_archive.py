from __future__ import annotations

import argparse
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.weights.archive import Archive, Reopened, open_archive, read_pickle
from models.weights.errors import WeightsError

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


class Program:
    """What a hostile pickle holds: unpickling it would call os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def write(path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=path.suffix != ".old")
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.old"])
def test_every_format_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    archive = open_archive(write(tmp_path / name))
    assert dict(archive.shapes) == {"a": (3, 4), "b": (5,)}
    for key, tensor in TENSORS.items():
        assert torch.equal(archive.fetch(key), tensor)
        assert archive.fetch(key).dtype == tensor.dtype


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_reading_maps_the_file_instead_of_copying_it(tmp_path: Path, name: str) -> None:
    big = {f"t{i}": torch.ones(4 << 20) for i in range(4)}  # 64 MiB
    if name.endswith("safetensors"):
        save_file(big, tmp_path / name)
    else:
        torch.save(big, tmp_path / name)
    del big
    archive = open_archive(tmp_path / name)
    before = anonymous_bytes()
    held = [archive.fetch(f"t{i}") for i in range(4)]
    assert sum(float(tensor.sum()) for tensor in held) == 4 * (4 << 20)
    assert anonymous_bytes() - before < 16 << 20


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_tensor_that_is_released_leaves_the_process_and_comes_back(tmp_path: Path, name: str) -> None:
    big = {"a": torch.randn(4 << 20), "b": torch.randn(4 << 20)}  # 16 MiB each
    save_file(big, tmp_path / name) if name.endswith("safetensors") else torch.save(big, tmp_path / name)
    archive = open_archive(tmp_path / name)
    held = archive.fetch("a")
    assert torch.equal(held, big["a"])
    before = resident_bytes("RssFile")
    archive.release("a")
    assert before - resident_bytes("RssFile") > 15 << 20
    assert torch.equal(held, big["a"]) and torch.equal(archive.fetch("b"), big["b"])


def test_a_file_that_is_held_in_memory_is_not_touched_by_a_release(tmp_path: Path) -> None:
    archive = open_archive(write(tmp_path / "w.old"))
    assert not archive.is_mapped
    archive.release("a")
    assert torch.equal(archive.fetch("a"), TENSORS["a"])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.old"])
def test_sizes_are_known_before_anything_is_read(tmp_path: Path, name: str) -> None:
    assert dict(open_archive(write(tmp_path / name)).sizes) == {"a": 48, "b": 10}


def test_a_reopened_file_is_opened_when_it_is_asked_for(tmp_path: Path) -> None:
    opened: list[str] = []

    def open_file() -> Archive:
        opened.append("once more")
        return open_archive(write(tmp_path / "w.old"))

    file = Reopened(open_file)
    assert opened == []
    assert file() is file() and len(opened) == 1
    file.close()
    assert torch.equal(file().fetch("a"), TENSORS["a"]) and len(opened) == 2


def anonymous_bytes() -> int:
    return resident_bytes("RssAnon")


def resident_bytes(kind: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.old"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, keep: float) -> None:
    path = write(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(WeightsError, match=r"damaged|empty") as caught:
        open_archive(path)
    assert caught.value.file == str(path)
    assert "download or copy the file again" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.old"])
def test_flipped_bits_give_tensors_or_a_weights_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    content = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            archive = open_archive(path)
            for key in archive.shapes:
                archive.fetch(key)
        except WeightsError as error:
            assert "weights_only" not in str(error)
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_imports_a_program_is_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(2), "b": Program()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"refused: the file wants to import (posix|nt)\.system") as caught:
        open_archive(path)
    assert "weights_only" not in str(caught.value)


def test_a_namespace_is_allowed_only_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"args": argparse.Namespace(lr=0.5)}, path)
    assert read_pickle(path, allowed=(argparse.Namespace,)) == {"args": argparse.Namespace(lr=0.5)}
    with pytest.raises(WeightsError, match=r"argparse\.Namespace"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<HTML>", "web page"),
        (pickle.dumps([1, 2], protocol=2), "damaged"),
        (b"hello", "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_other_files_are_recognised(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_archive(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        open_archive(tmp_path / "none.pth")


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": 3}, {1: torch.ones(2)}])
def test_only_names_with_tensors_are_taken(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="expected"):
        open_archive(tmp_path / "w.pth")


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.int8), torch.ones(2).double(), torch.eye(2).to_sparse()])
def test_a_weight_of_another_kind_is_refused_when_it_is_read(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "w.pth")
    archive = open_archive(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="float16, bfloat16 or float32"):
        archive.fetch("a")


def test_an_old_torch_may_not_open_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "w.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(WeightsError, match=r"2\.9\.1"):
        open_archive(path)
