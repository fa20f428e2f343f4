"""The average of checkpoints: the formula to the last bit, over shards of any cut, and what has no average."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.weights.errors import WeightsError
from models.weights.write.average import average


def tensors(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(4, 6, generator=generator).to(dtype) for name in ("a.weight", "b.weight")}
    return found | {"position_ids": torch.arange(5)}


def folder(path: Path, content: Mapping[str, Tensor], *, pickled: bool = False) -> Path:
    path.mkdir()
    if pickled:
        torch.save(dict(content), path / "pytorch_model.bin")
    else:
        save_file(dict(content), path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_the_sum_is_in_fp32_and_has_the_last_ones_dtype(tmp_path: Path) -> None:
    contents = [tensors(0), tensors(1, torch.bfloat16), tensors(2)]
    folders = [folder(tmp_path / str(i), content, pickled=i == 1) for i, content in enumerate(contents)]
    got = average(folders, [0.3, 0.2, 0.5])
    assert list(got) == list(contents[-1])
    for name in ("a.weight", "b.weight"):
        first, second, third = (content[name].float() * w for content, w in zip(contents, (0.3, 0.2, 0.5), strict=True))
        assert torch.equal(got[name].value(name), (first + second + third).half())
    assert torch.equal(got["position_ids"].value("position_ids"), torch.arange(5))


def test_one_checkpoint_with_weight_one_is_itself(tmp_path: Path) -> None:
    content = tensors(0)
    got = average([folder(tmp_path / "a", content)], [1.0])
    assert all(torch.equal(got[name].value(name), tensor) for name, tensor in content.items())


def test_another_dtype_is_for_floating_point_only(tmp_path: Path) -> None:
    got = average([folder(tmp_path / "a", tensors(0))], [1.0], torch.float32)
    assert {name: entry.dtype for name, entry in got.items()} == {
        "a.weight": torch.float32, "b.weight": torch.float32, "position_ids": torch.int64,
    }  # fmt: skip


def test_all_differences_are_listed(tmp_path: Path) -> None:
    other = {"a.weight": torch.zeros(4, 5), "position_ids": torch.arange(5), "c.weight": torch.zeros(2)}
    folders = [folder(tmp_path / "a", other), folder(tmp_path / "b", tensors(0))]
    with pytest.raises(WeightsError) as caught:
        average(folders, [0.5, 0.5])
    assert caught.value.missing == ["b.weight"] and caught.value.extra == ["c.weight"]
    assert caught.value.mismatched == ["a.weight: got 4x5, expected 4x6"]


def test_a_lora_is_no_model_to_average(tmp_path: Path) -> None:
    """What Bunny's tutorial does by mistake; its own script averages merged models."""
    lora = folder(tmp_path / "lora", tensors(0))
    (lora / "adapter_config.json").write_text("{}")
    for path, says in ((lora, "holds no whole model"), (tmp_path / "nowhere", "is not there")):
        with pytest.raises(WeightsError, match=says) as caught:
            average([path, folder(tmp_path / says, tensors(1))], [0.5, 0.5])
        assert "merge a LoRA into its base first" in str(caught.value)


def test_integers_must_be_the_same(tmp_path: Path) -> None:
    folders = [
        folder(tmp_path / "a", tensors(0) | {"position_ids": torch.arange(1, 6)}),
        folder(tmp_path / "b", tensors(1)),
    ]
    with pytest.raises(WeightsError, match="position_ids holds int64, which have no average"):
        average(folders, [0.5, 0.5])["position_ids"].value("position_ids")
