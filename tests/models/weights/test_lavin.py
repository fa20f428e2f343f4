from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.weights.errors import WeightsError
from models.weights.lavin import read_lavin_adapters, read_lavin_args, write_lavin_adapters

DIM, WIDTH, CODE, HIDDEN = 12, 10, 8, 6
Tensors = dict[str, Tensor]


def disk_tensors() -> Tensors:
    """What LaVIN trains, under its own names: one layer a model, with an MLP adapter in the language model."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_modality_embedding.weight": (2, DIM),
        "adapter_proj.conv_A.weight": (HIDDEN, WIDTH), "adapter_proj.conv_A.bias": (HIDDEN,),
        "adapter_proj.conv_B.weight": (DIM, HIDDEN), "adapter_proj.conv_B.bias": (DIM,),
    }  # fmt: skip
    places = (("layers.0.adapter_attn", DIM), ("layers.0.adapter_mlp", DIM),
              ("backbone.visual.transformer.resblocks.0.adapter_attn", WIDTH))  # fmt: skip
    for place, dim in places:
        shapes |= {
            f"{place}.conv_A.weight": (CODE, dim, 1), f"{place}.conv_A.bias": (CODE,),
            f"{place}.conv_B.weight": (dim, CODE // 2, 1), f"{place}.conv_B.bias": (dim,),
            f"{place}.conv_D.weight": (dim, CODE // 2, 1), f"{place}.conv_D.bias": (dim,),
            f"{place}.expert_weights.weight": (2, dim), f"{place}.expert_weights.bias": (2,),
        }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ours(disk: Tensors) -> Tensors:
    renames = (
        ("adapter_modality_embedding", "modality_embedding"), ("adapter_proj.conv_A", "projector.fc1"),
        ("adapter_proj.conv_B", "projector.fc2"), ("backbone.visual.transformer.resblocks.", "vision.LAYERS."),
        ("adapter_attn.", "attention_adapter."), ("adapter_mlp.", "mlp_adapter."), ("conv_A", "down"),
        ("conv_B", "up0"), ("conv_D", "up1"), ("expert_weights", "router"), ("LAYERS", "layers"),
    )  # fmt: skip
    out = {}
    for name, tensor in disk.items():
        name = f"language.{name}" if name.startswith("layers.") else name
        for theirs, mine in renames:
            name = name.replace(theirs, mine)
        out[name] = tensor[..., 0] if tensor.ndim == 3 else tensor
    return out


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def save(path: Path, disk: Tensors, prefix: str = "module.", **more: object) -> Path:
    torch.save({"model": {prefix + name: t for name, t in disk.items()}, **more}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_lavins_file_gives_our_names_and_shapes(tmp_path: Path, prefix: str) -> None:
    disk = disk_tensors()
    expected = ours(disk)
    path = save(
        tmp_path / "checkpoint-19.pth", disk, prefix, epoch=19, args=argparse.Namespace(temperature=5.0, bits="4bit"),
        optimizer={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.95)}]},
        scaler={"scale": 65536.0},
    )  # fmt: skip
    read = read_lavin_adapters(path, shapes(expected))
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    assert read_lavin_args(path) == {"temperature": 5.0, "bits": "4bit"}


def test_adapters_without_a_router(tmp_path: Path) -> None:
    disk = {name: t for name, t in disk_tensors().items() if "conv_D" not in name and "expert" not in name}
    expected = ours(disk)
    read = read_lavin_adapters(save(tmp_path / "a.pth", disk), shapes(expected))
    assert sorted({name.rsplit(".", 2)[1] for name in read if "_adapter" in name}) == ["down", "up0"]


@pytest.mark.parametrize(("args", "values"), [(None, {}), ({"temperature": 10.0}, {"temperature": 10.0})])
def test_args_may_be_absent_or_a_dict(tmp_path: Path, args: object, values: dict[str, object]) -> None:
    more = {} if args is None else {"args": args}
    assert read_lavin_args(save(tmp_path / "a.pth", disk_tensors(), **more)) == values


@pytest.mark.parametrize("module_prefix", [True, False])
def test_what_is_written_is_what_lavin_writes(tmp_path: Path, module_prefix: bool) -> None:
    disk = disk_tensors()
    path = tmp_path / "checkpoint-3.pth"
    args = {"temperature": 10.0, "bits": "4bit", "blr": None, "options": ("A", "B")}
    write_lavin_adapters(path, ours(disk), epoch=3, args=args, module_prefix=module_prefix)
    content = torch.load(path, weights_only=True)
    prefix = "module." if module_prefix else ""
    assert sorted(content["model"]) == sorted(prefix + name for name in disk)
    for name, tensor in disk.items():
        written = content["model"][prefix + name]
        assert written.dtype == torch.float32 and written.shape == tensor.shape
        assert torch.equal(written, tensor), name
    assert (content["epoch"], content["args"]["options"]) == (3, ["A", "B"])
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3.pth"]
    assert read_lavin_args(path)["temperature"] == 10.0
    assert torch.equal(
        read_lavin_adapters(path, shapes(ours(disk)))["modality_embedding.weight"],
        disk["adapter_modality_embedding.weight"],
    )


def test_a_view_does_not_take_its_storage_into_the_file(tmp_path: Path) -> None:
    wide = torch.zeros(1 << 20)
    write_lavin_adapters(
        tmp_path / "a.pth", {"projector.fc1.bias": wide[:6].bfloat16()}, epoch=0, args={}, module_prefix=False
    )
    assert (tmp_path / "a.pth").stat().st_size < 10_000


def test_every_difference_is_listed_by_its_name_on_disk(tmp_path: Path) -> None:
    disk = disk_tensors()
    expected = shapes(ours(disk))
    del disk["adapter_proj.conv_A.bias"]
    disk["layers.1.adapter_attn.conv_A.bias"] = torch.ones(CODE)
    disk["layers.0.adapter_attn.conv_A.weight"] = torch.ones(4, DIM, 1)
    disk["layers.0.adapter_attn.conv_B.weight"] = torch.ones(DIM, 4)  # a matrix where a convolution is expected
    with pytest.raises(WeightsError) as caught:
        read_lavin_adapters(save(tmp_path / "a.pth", disk), expected)
    assert caught.value.missing == ["adapter_proj.conv_A.bias"]
    assert caught.value.extra == ["layers.1.adapter_attn.conv_A.bias"]
    assert caught.value.mismatched == [
        "layers.0.adapter_attn.conv_A.weight: got 4x12x1, expected 8x12x1",
        "layers.0.adapter_attn.conv_B.weight: got 12x4, expected 12x4x1",
    ]
    assert "--adapter.dim" in str(caught.value)


def test_a_name_with_and_without_module(tmp_path: Path) -> None:
    disk = disk_tensors()
    disk["module.adapter_proj.conv_A.bias"] = torch.ones(HIDDEN)
    with pytest.raises(WeightsError, match="both with and without"):
        read_lavin_adapters(save(tmp_path / "a.pth", disk, ""), {})


@pytest.mark.parametrize("content", [{"a": torch.ones(2)}, {"model": 3}, [1]])
def test_a_file_that_is_not_lavins(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="not one of LaVIN's checkpoints"):
        read_lavin_adapters(tmp_path / "a.pth", {})


def test_a_truncated_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", disk_tensors())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="damaged"):
        read_lavin_args(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")

    def fail(content: object, file: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_lavin_adapters(path, {}, epoch=0, args={}, module_prefix=True)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_names_and_args_that_have_no_place(tmp_path: Path) -> None:
    for tensors, args in (({"language.norm.weight": torch.ones(2)}, {}), ({}, {"device": torch.device("cpu")})):
        with pytest.raises(ValueError, match=r"no place in LaVIN|args hold a device"):
            write_lavin_adapters(tmp_path / "a.pth", tensors, epoch=0, args=args, module_prefix=True)
    assert [file.name for file in tmp_path.iterdir()] == []
