"""Bunny's and MobileVLM's projectors against plain torch in fp64, as their projects order the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.projector import Projector, ProjectorConfig, make_projector
from models.projectors.config import GROUPED, SPP
from models.projectors.ldp import squeezed_width
from models.vlm import VLMConfig
from tests.models.test_joint import LANGUAGE, VISION, pack_of
from tests.models.tiny import assert_close, tiny_model

KINDS = [*SPP, *GROUPED, "ldp"]
W, D = 6, 24
State = dict[str, Tensor]


def affine(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def as_grid(x: Tensor) -> Tensor:  # [M, K, C] -> [M, C, side, side]
    side = isqrt(x.shape[1])
    return x.permute(0, 2, 1).reshape(x.shape[0], -1, side, side)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).permute(0, 2, 1)


def pooled(x: Tensor) -> Tensor:
    return as_tokens(F.avg_pool2d(as_grid(x), 2))


def block(x: Tensor, state: State, name: str, stride: int) -> Tensor:
    """[M, C, side, side], channels second."""

    def normed(h: Tensor, norm: str) -> Tensor:
        weight, bias = state[f"{name}.{norm}.weight"], state[f"{name}.{norm}.bias"]
        return F.layer_norm(h.permute(0, 2, 3, 1), (h.shape[1],), weight, bias, 1e-5).permute(0, 3, 1, 2)

    depthwise = state[f"{name}.depthwise.weight"]
    h = F.hardswish(normed(F.conv2d(x, depthwise, None, stride, 1, groups=x.shape[1]), "depthwise_norm"))
    gate = F.adaptive_avg_pool2d(h, 1)
    gate = F.relu(F.conv2d(gate, state[f"{name}.squeeze.weight"], state[f"{name}.squeeze.bias"]))
    h = h * F.hardsigmoid(F.conv2d(gate, state[f"{name}.excite.weight"], state[f"{name}.excite.bias"]))
    h = normed(F.conv2d(h, state[f"{name}.pointwise.weight"]), "pointwise_norm")
    return h + x if stride == 1 else h


def ldp(x: Tensor, s: State) -> Tensor:
    h = as_grid(affine(F.gelu(affine(x, s, "linear_1")), s, "linear_2"))
    return as_tokens(block(block(h, s, "block_1", 1), s, "block_2", 2))


def vanilla(x: Tensor, s: State) -> Tensor:
    groups = [torch.stack(group, dim=-1).flatten(1) for group in zip(*[iter(x.unbind(1))] * 4, strict=True)]
    return affine(torch.stack(groups, dim=1), s, "linear")


def minigpt(x: Tensor, s: State) -> Tensor:
    groups = [torch.cat(group, dim=-1) for group in zip(*[iter(x.unbind(1))] * 4, strict=True)]
    return affine(torch.stack(groups, dim=1), s, "linear")


PLAIN: dict[str, Callable[[Tensor, State], Tensor]] = {
    "sppv1": lambda x, s: affine(pooled(affine(x, s, "linear_1")), s, "linear_2"),
    "sppv2": lambda x, s: pooled(affine(affine(x, s, "linear_1"), s, "linear_2")),
    "sppv3": lambda x, s: affine(affine(pooled(affine(x, s, "linear_0")), s, "linear_1"), s, "linear_2"),
    "minigpt": minigpt, "vanilla": vanilla, "ldp": ldp,
}  # fmt: skip


def projector(kind: str) -> Projector:
    torch.manual_seed(0)
    made = make_projector(ProjectorConfig(kind=kind), W, D)
    made.reset()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made


@pytest.mark.parametrize(
    ("kind", "side"), [(kind, side) for kind in KINDS for side in (4, 5) if side == 4 or kind not in GROUPED]
)
def test_a_projector_is_its_formula(kind: str, side: int) -> None:
    made = projector(kind).double()
    x = torch.randn(3, side**2, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    got, expected = made(x), PLAIN[kind](x, dict(made.named_parameters()))
    tokens = {4: 4, 5: 9 if kind == "ldp" else 4}[side]
    assert got.shape == (3, tokens, D) and made.tokens(side**2) == tokens
    assert_close(got, expected, kind, tolerance=1e-12)
    inputs = [x, *(p for name, p in made.named_parameters() if name not in unused(kind))]
    weights = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert_close(gradient, wanted, f"gradient of {kind}", tolerance=1e-9)


def unused(kind: str) -> set[str]:
    return {"linear_0.weight", "linear_0.bias"} if kind in ("sppv1", "sppv2") else set()


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits(kind: str) -> None:
    """Features in 16 bits, parameters in fp32."""
    made = projector(kind)
    x = torch.randn(2, 16, W, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = made(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), made(x.float()), rtol=0.05, atol=0.05)


def test_published_widths_and_counts() -> None:
    for kind in SPP:
        assert [ProjectorConfig(kind=kind).tokens(k) for k in (729, 576)] == [169, 144]
    assert [ProjectorConfig(kind="ldp").tokens(k) for k in (729, 576)] == [196, 144]
    for kind in GROUPED:
        assert ProjectorConfig(kind=kind).tokens(576) == 144
        with pytest.raises(ValueError, match="729 are no multiple of it"):
            ProjectorConfig(kind=kind).tokens(729)
    with pytest.raises(ValueError, match="577 features; take patches only"):
        ProjectorConfig(kind="sppv1").tokens(577)
    with pytest.raises(ValueError, match="it needs a multiple of 8"):
        make_projector(ProjectorConfig(kind="ldp"), W, 20)
    # torchvision's rule; of Phi-2, Phi-3, LLaMA-3, and two that are no multiples of 32
    assert [squeezed_width(dim) for dim in (2560, 3072, 4096, 24, 72)] == [640, 768, 1024, 8, 24]
    with torch.device("meta"):
        ldp = make_projector(ProjectorConfig(kind="ldp"), 1024, 2048)
    block = 9 * 2048 + 4 * 2048 + 2 * 512 * 2048 + 512 + 2048 + 2048**2
    assert sum(p.numel() for p in ldp.parameters()) == 2048 * (1024 + 1) + 2048 * 2049 + 2 * block


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training(kind: str) -> None:
    """In a whole model, the projector alone: the loss falls, everything that is used learns."""
    tower = VISION["siglip"]
    config = VLMConfig(
        language=LANGUAGE["phi"], vision=replace(tower, patch_size=tower.image_size // 4),
        projector=ProjectorConfig(kind=kind), train_language="frozen", train_vision="frozen",
    )  # fmt: skip
    model, pack = tiny_model(config), pack_of(config)
    first = model(pack)
    first.backward()
    learns = {name.removeprefix("projector."): p for name, p in model.trainable().items()}
    assert {name for name, p in learns.items() if p.grad is None} == unused(kind)
    with torch.no_grad():
        for parameter in learns.values():
            if parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad)
    assert model(pack) < first
