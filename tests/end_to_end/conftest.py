"""One tiny world for all end-to-end tests, and a way to type commands into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import train
from engine.errors import run_command
from tests.world import make_base, make_rows, make_scienceqa, make_tokenizer


@dataclass(frozen=True)
class World:
    """Paths of the world, and the flags that name its base."""

    root: Path
    rows: Path

    @property
    def base(self) -> list[str]:
        weights = self.root / "weights"
        return ["--model.language", str(weights / "7B"), "--model.vision", str(weights / "7B" / "tower")]

    @property
    def scienceqa(self) -> list[str]:
        return [*self.base, "--dataset.root", str(self.root)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    weights = root / "weights"
    weights.mkdir()
    make_tokenizer(weights / "tokenizer.model")
    make_base(weights / "7B", weights / "tokenizer.model")
    make_scienceqa(root)
    folder = root / "pictures"
    folder.mkdir()
    return World(root, make_rows(folder))


Train = Callable[..., int]


@pytest.fixture
def type_train(tmp_path: Path) -> Train:
    """Types `train.py FLAGS --output_dir tmp/NAME`; returns the exit code."""

    def run(*flags: object, name: str = "run") -> int:
        return run_command(train.main, [*map(str, flags), "--output_dir", str(tmp_path / name)])

    return run


@pytest.fixture
def read_json() -> Callable[[Path], Any]:
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
