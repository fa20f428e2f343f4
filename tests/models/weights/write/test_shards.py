"""Shards and their index: what transformers expects, one tensor at a time, nothing that was not announced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from engine.tensor_file import TensorWriter
from models.weights.errors import WeightsError
from models.weights.hf_files import HfTensors, tensor_files
from models.weights.write.entries import Entry, tensor_entries
from models.weights.write.shards import plan_shards, write_shards

SIZES = {"a": 100, "b": 300, "c": 900, "d": 10, "e": 10}  # fp16 elements: 200, 600, 1800, 20, 20 bytes


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator).half() for name, size in SIZES.items()}


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(10_000, ["abcde"]), (1000, ["ab", "c", "de"]), (800, ["ab", "c", "de"]), (799, ["a", "b", "c", "de"])],
)
def test_a_shard_is_full_before_it_is_too_large(largest: int, expected: list[str]) -> None:
    assert plan_shards(tensor_entries(tensors()), largest) == [list(names) for names in expected]


def test_shards_and_index_hold_every_tensor_bit_for_bit(tmp_path: Path) -> None:
    files = write_shards(tmp_path, tensor_entries(tensors()), TensorWriter, largest=1000)
    assert [path.name for path in files] == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 2 * sum(SIZES.values())
    found = HfTensors(tensor_files(tmp_path))
    for name, tensor in tensors().items():
        assert torch.equal(found.fetch(name), tensor)
        with safe_open(tmp_path / index["weight_map"][name], framework="pt") as file:
            assert file.metadata() == {"format": "pt"} and name in file.keys()  # noqa: SIM118 (it is no dict)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    assert [p.name for p in write_shards(tmp_path, tensor_entries(tensors()), TensorWriter)] == ["model.safetensors"]


def test_one_tensor_is_read_at_a_time(tmp_path: Path) -> None:
    """Each is released before the next is read, and none is read for the plan."""
    told: list[str] = []

    def entry(name: str, tensor: Tensor) -> Entry:
        def read() -> Tensor:
            told.append(f"read {name}")
            return tensor

        return Entry(tuple(tensor.shape), tensor.dtype, read, lambda: told.append(f"released {name}"))

    write_shards(tmp_path, {n: entry(n, t) for n, t in tensors().items()}, TensorWriter, largest=1000)
    assert told == [f"{what} {name}" for name in SIZES for what in ("read", "released")]


def test_a_tensor_of_another_shape_is_no_file(tmp_path: Path) -> None:
    entry = Entry((3,), torch.float32, lambda: torch.zeros(4))
    with pytest.raises(WeightsError, match=r"has the shape \(4,\); expected \(3,\)"):
        write_shards(tmp_path, {"a": entry}, TensorWriter)


def test_float16_that_would_overflow_is_an_error_and_infinities_are_kept(tmp_path: Path) -> None:
    large = torch.tensor([1.0, 1e5])
    with pytest.raises(WeightsError, match=r"up to 1e\+05, more than float16 holds"):
        tensor_entries({"a": large}, torch.float16)["a"].value("a")
    assert torch.equal(tensor_entries({"a": large}, torch.bfloat16)["a"].value("a"), large.bfloat16())
    masked = torch.tensor([-torch.inf, 1.0])
    assert torch.equal(tensor_entries({"a": masked}, torch.float16)["a"].value("a"), masked.half())
