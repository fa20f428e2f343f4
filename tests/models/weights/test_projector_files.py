from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.projector import ProjectorConfig, make_projector
from models.projectors.ldp import DIVISOR
from models.weights.checkpoint import open_checkpoint
from models.weights.errors import WeightsError
from models.weights.projector_files import FILES, read_projector
from models.weights.projector_names import BUNNY, our_projector_name, projector_kind, their_projector_name

VISION, LANGUAGE = 6, 4
PREFIXES = ("model.mm_projector.", "transformer.mm_projector.", "base_model.model.model.mm_projector.", "mm_projector.")


def projector(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = make_projector(ProjectorConfig(kind=kind), VISION, LANGUAGE)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def on_disk(tensors: dict[str, Tensor], kind: str, prefix: str) -> dict[str, Tensor]:
    """Written out by hand: a GELU stands between two linears of an MLP."""
    names = {"layers.0": "0.", "layers.1": "2.", "layers.2": "4."} if kind != "linear" else {"layers.0": ""}
    return {prefix + names[name[:8]] + name[9:]: tensor for name, tensor in tensors.items()}


def same(found: object, expected: dict[str, Tensor]) -> bool:
    assert isinstance(found, dict)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_any_prefix_and_kind(tmp_path: Path, kind: str, prefix: str) -> None:
    tensors = projector(kind)
    torch.save(on_disk(tensors, kind, prefix), tmp_path / "mm_projector.bin")
    file = read_projector(tmp_path)
    assert file.kind == kind and file.path == tmp_path / "mm_projector.bin"
    assert same(file.tensors, tensors)
    assert file.image_newline is None and not file.tower


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_names_both_ways(kind: str) -> None:
    tensors = projector(kind)
    names = {their_projector_name(name, kind): name for name in tensors}
    assert names.keys() == on_disk(tensors, kind, "").keys()
    assert projector_kind(names) == kind
    assert [our_projector_name(leaf, kind) for leaf in names] == list(tensors)


def bunny_names(kind: str) -> dict[str, str]:
    """Ours -> Bunny's; of ldp those that torchvision's InvertedResidual gives its parts."""
    if kind.startswith("spp"):
        return {f"linear_{i}.{leaf}": f"linear_{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")}
    if kind != "ldp":
        return {"linear.weight": "linear.weight", "linear.bias": "linear.bias"}
    found = dict[str, str]()
    for i, number in ((1, 1), (2, 3)):
        found |= {f"linear_{i}.{leaf}": f"model.mlp.{number}.{leaf}" for leaf in ("weight", "bias")}
        block = f"model.mb_block.{i}.block"
        found |= {
            f"block_{i}.depthwise.weight": f"{block}.0.0.weight",
            f"block_{i}.depthwise_norm.weight": f"{block}.0.1.weight",
            f"block_{i}.depthwise_norm.bias": f"{block}.0.1.bias",
            f"block_{i}.squeeze.weight": f"{block}.1.fc1.weight",
            f"block_{i}.squeeze.bias": f"{block}.1.fc1.bias",
            f"block_{i}.excite.weight": f"{block}.1.fc2.weight",
            f"block_{i}.excite.bias": f"{block}.1.fc2.bias",
            f"block_{i}.pointwise.weight": f"{block}.2.0.weight",
            f"block_{i}.pointwise_norm.weight": f"{block}.2.1.weight",
            f"block_{i}.pointwise_norm.bias": f"{block}.2.1.bias",
        }
    return found


def bunny_projector(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = make_projector(ProjectorConfig(kind=kind), VISION, 2 * DIVISOR)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("prefix", [PREFIXES[0], PREFIXES[2]])
@pytest.mark.parametrize("kind", BUNNY)
def test_bunnys_projectors(tmp_path: Path, kind: str, prefix: str) -> None:
    tensors, names = bunny_projector(kind), bunny_names(kind)
    assert tensors.keys() == names.keys()
    torch.save({prefix + names[name]: tensor for name, tensor in tensors.items()}, tmp_path / "mm_projector.bin")
    file = read_projector(tmp_path, kind)
    assert file.kind == kind and same(file.tensors, tensors)
    assert {their_projector_name(name, kind) for name in tensors} == set(names.values())
    read = open_checkpoint(tmp_path, projector=kind)
    assert read.projector_kind == kind and same(read.projector, tensors)


@pytest.mark.parametrize(("kind", "kinds"), [("sppv2", "sppv1 or sppv2 or sppv3"), ("minigpt", "minigpt or vanilla")])
def test_kinds_with_the_same_tensors(tmp_path: Path, kind: str, kinds: str) -> None:
    tensors = bunny_projector(kind)
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in tensors.items()}, tmp_path / FILES[0])
    for said in ("", "linear"):
        with pytest.raises(WeightsError, match=f"may be {kinds}: say which"):
            read_projector(tmp_path, said)
    settings = {"model_type": "bunny-phi", "mm_vision_tower": "siglip", "mm_projector_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    read = open_checkpoint(tmp_path)
    assert read.projector_kind == kind and read.settings is not None and read.settings.projector == kind


@pytest.mark.parametrize(
    ("kind", "name", "shape", "message"),
    [
        ("sppv3", "linear_0.weight", (VISION, VISION + 1), "model.mm_projector.linear_0.weight: got 6x7, expected 6x6"),
        ("vanilla", "linear.bias", (3,), "model.mm_projector.linear.bias: got 3, expected 16"),
        ("ldp", "model.mb_block.2.block.0.0.weight", (16, 1, 5, 5), "got 16x1x5x5, expected 16x1x3x3"),
        ("ldp", "model.mlp.1.weight", (16,), "no matrix"),
        ("ldp", "model.mlp.1.weight", (12, VISION), "it needs a multiple of 8"),
    ],
)
def test_bunnys_projectors_that_do_not_fit(
    tmp_path: Path, kind: str, name: str, shape: tuple[int, ...], message: str
) -> None:
    names = bunny_names(kind)
    content = {f"model.mm_projector.{names[ours]}": tensor for ours, tensor in bunny_projector(kind).items()}
    torch.save(content | {f"model.mm_projector.{name}": torch.ones(shape)}, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError) as caught:
        read_projector(tmp_path, kind)
    assert message in f"{caught.value} {caught.value.mismatched}"


def test_what_training_leaves_beside_a_lora(tmp_path: Path) -> None:
    prefix = "base_model.model.model."
    tower = {"vision_model.embeddings.class_embedding": torch.ones(3), "model.cls_token": torch.ones(1, 1, 3)}
    content = on_disk(projector("mlp2x_gelu"), "mlp2x_gelu", f"{prefix}mm_projector.")
    content |= {f"{prefix}vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    content[f"{prefix}image_newline"] = torch.arange(4.0)
    torch.save(content, tmp_path / "non_lora_trainables.bin")
    file = read_projector(tmp_path)
    assert file.tower is not None and same(file.tensors, projector("mlp2x_gelu"))
    assert same({name: file.tower.fetch(name) for name in file.tower.shapes}, tower)
    assert file.image_newline is not None and torch.equal(file.image_newline, torch.arange(4.0))


def test_transformers_names(tmp_path: Path) -> None:
    tensors = projector("mlp2x_gelu")
    names = {"layers.0": "linear_1", "layers.1": "linear_2"}
    content = {f"multi_modal_projector.{names[n[:8]]}.{n[9:]}": tensor for n, tensor in tensors.items()}
    save_file(content, tmp_path / "mm_projector.safetensors")
    assert same(read_projector(tmp_path).tensors, tensors)


def test_names_that_have_no_place() -> None:
    assert projector_kind([]) == "identity"
    for kind, name in (("linear", "layers.1.weight"), ("identity", "layers.0.weight"), ("mlp2x_gelu", "fc1.weight")):
        with pytest.raises(ValueError, match="has no name"):
            their_projector_name(name, kind)
    with pytest.raises(ValueError, match="is no tensor of"):
        our_projector_name("0.weight", "linear")


@pytest.mark.parametrize(
    "names",
    [
        ["0.weight", "0.bias", "1.weight", "1.bias"],  # no GELU between them
        ["0.weight", "2.weight", "2.bias"],
        ["linear_0.weight", "linear_0.bias"],
        ["linear_1.weight", "linear_1.bias"],
        ["model.mlp.1.weight"],
    ],
)
def test_a_projector_of_another_kind(tmp_path: Path, names: list[str]) -> None:
    torch.save({f"model.mm_projector.{name}": torch.ones(2, 2) for name in names}, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match="of no kind that is known: linear, mlpNx_gelu, identity"):
        read_projector(tmp_path)


def test_files_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    with pytest.raises(WeightsError, match=r"holds none of mm_projector\.bin"):
        read_projector(tmp_path)
    content = on_disk(projector("mlp2x_gelu"), "mlp2x_gelu", "model.mm_projector.")
    torch.save(content | {"transformer.embd.wte.weight": torch.ones(3, 3)}, path)
    with pytest.raises(WeightsError, match="holds trained tensors") as caught:
        read_projector(path)
    assert caught.value.extra == ["transformer.embd.wte.weight"]
    torch.save(content | {"model.mm_projector.2.weight": torch.ones(LANGUAGE, LANGUAGE + 1)}, path)
    with pytest.raises(WeightsError, match="no chain of linear layers") as caught:
        read_projector(path)
    assert len(caught.value.mismatched) == 1 and caught.value.mismatched[0].startswith("model.mm_projector.2.weight")
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="damaged"):
        read_projector(path)


def test_a_pickle_that_wants_more_than_tensors(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("exit 1",)

    torch.save({"model.mm_projector.weight": Program()}, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match="wants to import"):
        read_projector(tmp_path)
