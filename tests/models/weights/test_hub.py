"""Names on the hub without a network: caches as huggingface_hub leaves them, and a stand-in for its two calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.weights.errors import WeightsError
from models.weights.hub import REVISIONS, cache_folder, find_cached, resolve, weights_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]
NAME = "org/clip-vit"
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class HttpError(Exception):
    """As those of httpx: of no built-in kind."""


class Hub:
    """huggingface_hub, as far as it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str]) -> None:
        self.asked: list[tuple[str, str | None, list[str]]] = []
        self.folder, self.files, self.error = folder, files, None
        module = SimpleNamespace(HfApi=lambda: self, snapshot_download=self.download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)

    def list_repo_files(self, name: str, *, revision: str | None) -> list[str]:
        if name != NAME:
            raise HttpError(f"404 Client Error: {name}\nand more")
        return self.files

    def download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "downloaded", ["config.json", "model.safetensors", "pytorch_model.bin"])


def cached(commit: str, *files: str, ref: str = "main") -> Path:
    repository = cache_folder() / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in files:
        (snapshot / file).touch()
    return snapshot


def test_a_path_that_exists_is_itself(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "org" / "clip-vit").mkdir(parents=True)
    assert resolve(NAME) == Path(NAME)
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert not hub.asked


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("HF_HUB_CACHE", "{0}/a", "a"), ("HUGGINGFACE_HUB_CACHE", "{0}/a", "a"), ("HF_HOME", "{0}/a", "a/hub"),
        ("HF_HOME", "~/a", "a/hub"), ("XDG_CACHE_HOME", "{0}/a", "a/huggingface/hub"),
        ("UNSET", "", ".cache/huggingface/hub"),
    ],
)  # fmt: skip
def test_the_cache_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value.format(tmp_path))
    assert cache_folder() == tmp_path / expected
    snapshot = cached(COMMIT, "config.json", "pytorch_model.bin")
    other = cached(OTHER, "model.safetensors", ref="v1.0")
    assert resolve(NAME) == snapshot
    assert resolve(NAME, "v1.0") == resolve(NAME, OTHER) == other
    assert not hub.asked


def test_revisions_by_commit_and_by_name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(COMMIT, "model.safetensors", ref="elsewhere")
    assert resolve(f"{NAME}@{COMMIT}") == resolve(f"{NAME}@elsewhere") == snapshot
    assert not hub.asked
    monkeypatch.setitem(REVISIONS, (NAME, "old"), OTHER)
    assert resolve(f"{NAME}@old") == hub.folder
    assert hub.asked[0][:2] == (NAME, OTHER)


def test_what_is_not_whole_is_downloaded(hub: Hub) -> None:
    snapshot = cached(COMMIT, "config.json")
    assert find_cached(NAME) == snapshot
    assert resolve(NAME) == hub.folder
    (snapshot / "model-00001-of-00002.safetensors").touch()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve(NAME) == hub.folder
    (snapshot / "model-00002-of-00002.safetensors").touch()
    assert resolve(NAME) == snapshot
    assert len(hub.asked) == 2


def test_a_download_asks_for_the_revision_and_for_each_weight_once(hub: Hub) -> None:
    assert resolve(NAME, COMMIT) == hub.folder
    ((name, revision, patterns),) = hub.asked
    assert (name, revision) == (NAME, COMMIT)
    assert "model.safetensors" in patterns and "*.json" in patterns and "*.model" in patterns
    assert not any("bin" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["a-1.safetensors", "a-2.safetensors", "original/consolidated.00.pth"],
            ["a-1.safetensors", "a-2.safetensors"],
        ),
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (
            ["adapter_model.safetensors", "non_lora_trainables.bin", "training_args.bin", "optimizer.bin"],
            ["adapter_model.safetensors", "non_lora_trainables.bin"],
        ),
        (["mm_projector.bin", "config.json"], ["mm_projector.bin"]),
        (["EVA.pt"], ["EVA.pt"]),
        (["EVA01.pt", "EVA02.pt"], []),
    ],
)
def test_which_files_are_the_weights(files: list[str], expected: list[str]) -> None:
    assert weights_of(files) == expected


def test_errors_say_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="no name on the Hugging Face hub"):
        resolve("weights/7B/llama")
    with pytest.raises(WeightsError, match="could not be downloaded: 404 Client Error: org/none\n"):
        resolve("org/none")
    hub.files = ["EVA01.pt", "EVA02.pt"]
    with pytest.raises(WeightsError, match="several files"):
        resolve(NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    with pytest.raises(WeightsError, match=r"pip install '\.\[hub\]'.*pip install huggingface_hub"):
        resolve(NAME)


def test_offline_nothing_is_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="neither a path nor in the cache, and HF_HUB_OFFLINE"):
        resolve(NAME)
    snapshot = cached(COMMIT, "config.json")
    with pytest.raises(WeightsError, match="without all its weights"):
        resolve(NAME)
    (snapshot / "model.safetensors").touch()
    assert resolve(NAME) == snapshot
    assert not hub.asked
