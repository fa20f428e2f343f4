"""A file is whole or absent: after an error the earlier one stays, and nothing gets its name before it is durable."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.weights.whole import whole
from tests.engine import faulty_files


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_text("earlier")
    with pytest.raises(KeyError), whole(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and file.read_text() == "earlier"


def test_content_is_synced_before_the_rename_and_the_folder_after_it(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    with faulty_files.numbered_operations() as log, whole(file) as temporary:
        temporary.write_text("new")
    order = [entry for entry in log if entry[0] in ("fsync", "replace")]
    assert order == [("fsync", str(temporary)), ("replace", str(temporary), str(file)), ("fsync", str(tmp_path))]
    assert file.read_text() == "new"
