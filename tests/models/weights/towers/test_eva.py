"""EVA02-CLIP from BAAI's .pt files and from Bunny's checkpoints: names, values and every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.vision.eva import EvaConfig
from models.weights.archive import archive_of
from models.weights.errors import WeightsError
from models.weights.towers import eva, open_tower_tensors, open_vision, unused_tensors
from models.weights.towers.layout import tower_shapes
from models.weights.view import FileView

WIDTH, LAYERS, MLP, GRID, PATCH = 128, 3, 21, 3, 2
CONFIG = EvaConfig(
    width=WIDTH, num_layers=LAYERS, num_heads=2, patch_size=PATCH, image_size=GRID * PATCH, mlp_dim=MLP
)  # fmt: skip
BLOCK = {
    "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
    "attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,), "attn.q_proj.weight": (WIDTH, WIDTH),
    "attn.k_proj.weight": (WIDTH, WIDTH), "attn.v_proj.weight": (WIDTH, WIDTH),
    "attn.inner_attn_ln.weight": (WIDTH,), "attn.inner_attn_ln.bias": (WIDTH,), "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,), "attn.rope.freqs_cos": (9, 32), "attn.rope.freqs_sin": (9, 32),
    "mlp.w1.weight": (MLP, WIDTH), "mlp.w1.bias": (MLP,), "mlp.w2.weight": (MLP, WIDTH), "mlp.w2.bias": (MLP,),
    "mlp.ffn_ln.weight": (MLP,), "mlp.ffn_ln.bias": (MLP,), "mlp.w3.weight": (WIDTH, MLP), "mlp.w3.bias": (WIDTH,),
}  # fmt: skip
OURS = {
    "norm1": "attention_norm", "norm2": "mlp_norm", "attn.q_bias": "attention.q.bias",
    "attn.v_bias": "attention.v.bias", "attn.q_proj": "attention.q", "attn.k_proj": "attention.k",
    "attn.v_proj": "attention.v", "attn.inner_attn_ln": "attention.inner_norm", "attn.proj": "attention.o",
    "mlp.w1": "mlp.gate", "mlp.w2": "mlp.up", "mlp.ffn_ln": "mlp.inner_norm", "mlp.w3": "mlp.down",
}  # fmt: skip


def file_tensors() -> dict[str, Tensor]:
    """The tower by EVA's names, without a prefix."""
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, GRID**2 + 1, WIDTH), "patch_embed.proj.bias": (WIDTH,),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "rope.freqs_cos": (9, 32), "rope.freqs_sin": (9, 32),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (5, WIDTH), "head.bias": (5,),
    }  # fmt: skip
    shapes |= {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def expected(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    out = {
        "class_embedding": tensors["cls_token"][0, 0], "position_embedding": tensors["pos_embed"][0],
        "patch_embed.weight": tensors["patch_embed.proj.weight"], "patch_embed.bias": tensors["patch_embed.proj.bias"],
    }  # fmt: skip
    for i in range(layers):
        for name in BLOCK:
            if "rope" not in name:
                module, _, leaf = name.rpartition(".")
                here = OURS.get(name) or f"{OURS[module]}.{leaf}"
                out[f"layers.{i}.{here}"] = tensors[f"blocks.{i}.{name}"]
    return out


def text_model() -> dict[str, Tensor]:
    return {"text.transformer.resblocks.0.ln_1.weight": torch.ones(4), "logit_scale": torch.ones(())}


@pytest.mark.parametrize("outer", [None, "model", "module", "state_dict"])
def test_a_pt_file(tmp_path: Path, assert_same: Callable[..., None], outer: str | None) -> None:
    tensors = file_tensors()
    content: dict[str, object] = {f"visual.{name}": tensor for name, tensor in tensors.items()} | text_model()
    path = tmp_path / "weights.pt"  # the name says nothing
    torch.save(content if outer is None else {outer: content, "epoch": 6}, path)
    source = open_vision(path)
    assert source.config == CONFIG and source.files == (path,)
    assert_same(source.stream(), expected(tensors, LAYERS - 1))
    assert_same(open_vision(tmp_path, select_layer=-1).stream(), expected(tensors, LAYERS))  # its folder


def test_within_a_checkpoint_of_bunny_and_out_again(tmp_path: Path, assert_same: Callable[..., None]) -> None:
    tensors = file_tensors()
    inside = {f"model.{name}": tensor for name, tensor in tensors.items()}
    source = open_tower_tensors(tmp_path, FileView(lambda: archive_of(tmp_path / "m", inside)), None)
    assert_same(source.stream(), expected(tensors, LAYERS - 1))
    out = dict(unused_tensors(source))
    for name, tensor in source.stream():
        assert isinstance(tensor, Tensor)
        out[eva.EXPORT.of(name)] = tensor.reshape(*eva.EXPORT.leading.get(name, ()), *tensor.shape)
    assert out.keys() == inside.keys()
    assert all(torch.equal(tensor, inside[name]) for name, tensor in out.items())


def test_the_published_shape_is_read_from_shapes(tmp_path: Path) -> None:
    """EVA02_CLIP_L_336_psz14_s6B: a width of 2730 in the MLP, 16 heads of 64."""
    config = EvaConfig(select_layer=-1)
    shapes = eva.EVA.expected(tower_shapes(config))
    tensors = {f"visual.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    source = open_tower_tensors(tmp_path, FileView(lambda: archive_of(tmp_path / "m", tensors)), None)
    assert source.config == EvaConfig()


def test_every_difference_is_listed(tmp_path: Path) -> None:
    tensors = {f"visual.{name}": tensor for name, tensor in file_tensors().items()}
    del tensors["visual.blocks.1.attn.q_bias"]
    tensors |= {"visual.blocks.0.gamma_1": torch.ones(2), "visual.cls_token": torch.ones(1, 1, 5)}
    torch.save(tensors, tmp_path / "e.pt")
    with pytest.raises(WeightsError) as caught:
        open_vision(tmp_path / "e.pt")
    assert caught.value.missing == ["visual.blocks.1.attn.q_bias"]
    assert caught.value.extra == ["visual.blocks.0.gamma_1"]
    assert caught.value.mismatched == [f"visual.cls_token: got 1x1x5, expected 1x1x{WIDTH}"]


def test_an_eva_of_another_kind(tmp_path: Path) -> None:
    tensors = {f"visual.{name}": tensor for name, tensor in file_tensors().items() if ".mlp.w" not in name}
    torch.save(tensors, tmp_path / "EVA01.pt")
    with pytest.raises(WeightsError, match="has a SwiGLU") as caught:
        open_vision(tmp_path / "EVA01.pt")
    assert caught.value.missing == ["visual.blocks.0.mlp.w1.weight"]
