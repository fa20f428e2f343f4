from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from models.weights.errors import WeightsError
from models.weights.identity import check_identity, identity


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two folders with a file of the same name, as a language model's and a tower's config.json are."""
    paths = [tmp_path / "language" / "config.json", tmp_path / "vision" / "config.json", tmp_path / "w.bin"]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([i]) * (3 << 20))
    return paths


def test_the_same_files_elsewhere_are_accepted(tmp_path: Path, files: list[Path]) -> None:
    recorded = json.loads(json.dumps(identity(files)))
    check_identity(recorded, files)
    shutil.copytree(tmp_path / "language", tmp_path / "moved")
    check_identity(recorded, [tmp_path / "moved" / "config.json", *files[1:]])


def test_what_is_recorded(files: list[Path]) -> None:
    entry = identity(files)["files"][2]
    assert (entry["path"], entry["size"], len(str(entry["sha256"]))) == (str(files[2]), 3 << 20, 64)


@pytest.mark.parametrize("position", [0, (1 << 20) - 1, (3 << 20) - 1])
def test_a_changed_byte_at_either_end_is_noticed(files: list[Path], position: int) -> None:
    recorded = identity(files)
    content = bytearray(files[2].read_bytes())
    content[position] ^= 1
    files[2].write_bytes(content)
    with pytest.raises(WeightsError, match="not the base weights") as caught:
        check_identity(recorded, files)
    assert [len(caught.value.missing), len(caught.value.extra)] == [1, 1]
    assert caught.value.missing[0].startswith("w.bin (3145728 bytes")


def test_a_longer_file_and_another_number_of_files(files: list[Path]) -> None:
    recorded = identity(files)
    with pytest.raises(WeightsError, match=r"missing \(1\): w\.bin"):
        check_identity(recorded, files[:2])
    with pytest.raises(WeightsError, match=r"extra \(1\): w\.bin"):
        check_identity(recorded, [*files, files[2]])
    with files[2].open("ab") as file:
        file.write(b"x")
    with pytest.raises(WeightsError, match="3145729 bytes"):
        check_identity(recorded, files)


def test_a_file_that_is_gone(files: list[Path]) -> None:
    recorded = identity(files)
    files[2].unlink()
    with pytest.raises(WeightsError, match="No such file"):
        check_identity(recorded, files)


def test_a_snapshot_of_the_hub_is_the_same_as_a_copy(tmp_path: Path, files: list[Path]) -> None:
    """Its files are links to blobs that are named by their hashes."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    (tmp_path / "models--org--name" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copyfile(files[0], tmp_path / "models--org--name" / "blobs" / "ab12")
    (snapshot / "config.json").symlink_to("../../blobs/ab12")
    recorded = identity([files[0]])
    check_identity(recorded, [snapshot / "config.json"])
    assert str(identity([snapshot / "config.json"])["files"][0]["path"]) == str(snapshot / "config.json")
