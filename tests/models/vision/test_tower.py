"""What towers compute: against plain torch in fp64, against themselves run to the end, with adapters and few bits.

EVA02-CLIP's and transformers' own are in tests/models/parity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kernels.dispatch import set_backend
from kernels.linear_nf4 import linear_nf4, linears_nf4
from kernels.lora_linear import lora_linears
from kernels.nf4 import NF4Tensor
from kernels.rope import rope_table_2d
from models import linear
from models.adapters.lora import LoRA, LoRAConfig
from models.adapters.mma import MMAdapter, PlainAdapter
from models.recompute import POLICIES, Policy
from models.vision.tower import Context, Tower, make_tower
from tests.models.drawn import filled, frozen_tensors
from tests.models.kept import kept_by, rows_kept
from tests.models.vision.towers import FAMILIES, TILES, config_of, gradients, plain_states, tiles_of, tower_of

SEED = torch.tensor([5])
CPU = torch.device("cpu")
LORA = LoRAConfig(rank=4, alpha=3.0, dropout=0.5)
TRAINED: dict[str, dict[str, Any]] = {
    "full": {}, "normal": {"placement": "normal"}, "router": {"placement": "router"},
    "router_block": {"placement": "router_block"}, "lora": {"lora": LORA},
    "lora on two": {"lora": replace(LORA, targets=("attention.q", "mlp.down"))},
}  # fmt: skip


@pytest.fixture
def triton_backend() -> Iterator[None]:
    previous = set_backend("triton")
    yield
    set_backend(previous)


@pytest.mark.parametrize(
    ("family", "feature"),
    [("clip", "class_tokens"), ("clip", "patch"), ("clip", "cls_patch"), ("siglip", "patch"), ("siglip", "cls_patch")],
)
def test_features_and_all_gradients_are_those_of_plain_torch(family: str, feature: str) -> None:
    config = config_of(family, num_layers=6, select_feature=feature)
    tower, tiles = tower_of(config).double(), tiles_of(config).double()
    weights = {name: parameter.data.clone().requires_grad_() for name, parameter in tower.named_parameters()}
    states = plain_states(config, weights, tiles)
    if feature == "class_tokens":
        expected = torch.stack([state[:, 0] for state in states[1:]], dim=1)
    else:
        expected = states[-1][:, -config.tokens_out :]
    features = tower(tiles, None, None)
    assert features.is_contiguous() and features.shape == (TILES, config.tokens_out, config.width)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(features, expected, **close)
    ours = gradients(tower, features)
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).double()
    theirs = torch.autograd.grad((expected * direction).sum(), list(weights.values()))
    assert list(ours) == list(weights)  # the patch convolution, the table and the class token too
    for name, gradient in zip(weights, theirs, strict=True):
        torch.testing.assert_close(ours[name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selected_layer_is_that_of_the_whole_tower(family: str) -> None:
    whole = tower_of(config_of(family, select_layer=4, select_feature="cls_patch"))
    tiles, states = tiles_of(whole.config), list[Tensor]()
    for block in whole.blocks():
        block.register_forward_pre_hook(lambda _, inputs: states.append(sum(p for p in inputs[:2] if p is not None)))
    states.append(whole(tiles, None, None).flatten(0, 1))
    assert len(states) == 5
    for layer in range(-5, 5):
        for feature in ("patch", "cls_patch"):
            tower = make_tower(replace(whole.config, select_layer=layer, select_feature=feature))
            tower.load_state_dict({name: whole.get_parameter(name) for name, _ in tower.named_parameters()})
            expected = states[layer].unflatten(0, (TILES, -1))[:, -tower.config.tokens_out :]
            features = tower(tiles, None, None)
            assert torch.equal(features, expected) and features.is_contiguous()


def eva_class_tokens() -> tuple[Tower, Tower]:
    """One that gives class tokens of all blocks, one that gives all tokens of the last; the same tensors."""
    config = config_of("eva", num_layers=6, select_feature="class_tokens")
    return tower_of(config), tower_of(replace(config, select_feature="cls_patch", select_layer=-1))


def test_class_tokens_of_any_tower_that_has_one() -> None:
    taps, whole = eva_class_tokens()
    tiles = tiles_of(taps.config)
    assert torch.equal(taps(tiles, None, None)[:, -1], whole(tiles, None, None)[:, 0])


def test_tiles_do_not_see_each_other_and_no_pixel_is_seen_beyond_the_patches() -> None:
    for family in FAMILIES:
        tower = tower_of(config_of(family))
        tiles = tiles_of(tower.config)
        features = tower(tiles, None, None)
        tiles[1:] += 1
        tiles[0, :, 12] += 1
        changed = tower(tiles, None, None)
        assert torch.equal(changed[0], features[0]) and not (changed[1:] == features[1:]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_eva_tells_patches_apart_without_the_table(family: str) -> None:
    """Of patches alike in pixels and in the table, q and k turn by their places: each sees the class token anew."""
    tower = tower_of(config_of(family))
    tower.position_embedding.data[:] = tower.position_embedding.data[0]
    features = tower(torch.full((1, 3, 13, 13), 0.3), None, None)[0]
    spread = (features - features.mean(0)).abs().amax(1)
    assert spread.min() > 1e-3 if family == "eva" else spread.max() < 1e-5


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_policy_changes_a_bit(family: str, trained: str) -> None:
    config, found = config_of(family), list[dict[str, Tensor]]()
    tiles = tiles_of(config)
    for policy in POLICIES:
        tower = tower_of(config, policy=policy, **TRAINED[trained])
        features = tower(tiles, None, SEED)
        found.append({"features": features.detach(), **gradients(tower, features)})
    learns = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert set(found[0]) == learns | {"features"}
    assert all(gradient.any() for gradient in found[0].values())
    for other in found[1:]:
        assert [name for name, value in found[0].items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize("trained", ["normal", "router", "router_block", "lora", "lora on two"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_the_identity(family: str, trained: str) -> None:
    config = config_of(family)
    tower, plain, tiles = tower_of(config, **TRAINED[trained]), make_tower(config), tiles_of(config)
    plain.load_state_dict({name: tower.get_parameter(name) for name, _ in plain.named_parameters()})
    expected = plain(tiles, None, None)
    assert (tower(tiles, None, None) - expected).abs().max() > 1e-3
    adapters = [module for module in tower.modules() if isinstance(module, MMAdapter | PlainAdapter | LoRA)]
    assert len(adapters) == 3 * {"router_block": 2, "lora": 7 if family == "eva" else 6, "lora on two": 2}.get(
        trained, 1
    )
    for adapter in adapters:
        adapter.reset()
    torch.testing.assert_close(tower(tiles, None, SEED), expected, rtol=0, atol=1e-5)


def test_lora_names_linears_of_a_block() -> None:
    tower = make_tower(config_of("eva"))
    with pytest.raises(ValueError, match=r"mlp\.fc1.*attention\.q, .*mlp\.gate, mlp\.up, mlp\.down"):
        tower.add_lora(replace(LORA, targets=("attention.q", "mlp.fc1")), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_tile_can_route_the_others(family: str) -> None:
    """Token by token, whatever tokens a tower has."""
    tower = tower_of(config_of(family), placement="router_block")
    tiles = tiles_of(tower.config)
    own, by_first = (tower(tiles, router, None) for router in (None, torch.tensor([0, 0, 2])))
    assert torch.equal(own[[0, 2]], by_first[[0, 2]]) and not torch.equal(own[1], by_first[1])
    alike = tiles[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(tower(alike, torch.tensor([2, 0, 1]), None), tower(alike, None, None))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("save_all", {(10, 24): 2, (10, 3, 8): 4, (10, 37): 3}), ("recompute_mlp", {(10, 24): 2, (10, 3, 8): 4}),
        ("keep_input", {(10, 24): 1}),
    ],
)  # fmt: skip
def test_what_a_block_of_eva_keeps_with_the_kernels(policy: Policy, expected: dict[tuple[int, ...], int]) -> None:
    """The stream twice, q, k, v and what they give, gate, up and their product; tests/models/test_recompute.py has
    CLIP's."""
    config = config_of("eva", select_layer=1)
    tower = tower_of(config, placement="router_block", policy=policy)
    rope = (*rope_table_2d(8, 3, 3), torch.arange(10, dtype=torch.int32))
    bounds = torch.tensor([0, 10], dtype=torch.int32)
    context = Context(cu_seqlens=bounds, num_tokens=10, router=None, seed=SEED, rope=rope)
    x, delta = (torch.randn(10, 24, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in (3, 4))
    _, kept = kept_by(tower, lambda: tower.blocks()[0](x, delta, context))
    assert rows_kept(kept, 10) == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_keeps_nothing(family: str, policy: Policy) -> None:
    tower = tower_of(config_of(family), policy=policy)
    tiles = tiles_of(tower.config)
    assert kept_by(tower, lambda: tower(tiles, None, SEED))[1]
    tower.requires_grad_(False)
    assert not kept_by(tower, lambda: tower(tiles, None, SEED))[1]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_few_bits_and_in_16_bit_numbers(family: str, bits: int) -> None:
    """Filled as loading does it: norms, class token and table stay in fp32, and LoRA learns beside packed weights."""
    source = tower_of(config_of(family))
    with torch.device("meta"):
        tower = make_tower(source.config)
    filled(tower, frozen_tensors(source), lambda name: bits, torch.bfloat16).requires_grad_(False)
    assert tower.position_embedding.dtype == torch.float32
    tower.add_lora(LORA, 1 << 19)
    for module in tower.modules():
        if isinstance(module, LoRA):
            module.reset()
    tiles = tiles_of(source.config)
    features, exact = tower(tiles, None, None), source(tiles, None, None).detach()
    assert features.dtype == torch.bfloat16
    error = float((features.detach() - exact).norm() / exact.norm())
    assert error < {4: 0.2, 8: 0.04, 16: 0.02}[bits]
    assert all(gradient.isfinite().all() for gradient in gradients(tower, features).values())
    assert any(gradient.any() for gradient in gradients(tower, tower(tiles, None, SEED)).values())


@pytest.mark.parametrize("trained", ["router", "lora", "lora on two"])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_linears_that_are_computed_together(
    family: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tower_of(config_of(family, select_layer=1), **TRAINED[trained])
    filled(tower, list(frozen_tensors(tower)), lambda name: 4)
    together: list[list[int]] = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def op(x: Tensor, weights: Any, *rest: Any, **options: Any) -> Any:
            places = [weight.codes.data_ptr() for weight in ([weights] if real is linear_nf4 else weights)]
            together.append(places)
            return real(x, weights, *rest, **options)

        return op

    for op in (linear_nf4, linears_nf4, lora_linears):
        monkeypatch.setattr(linear, op.__name__, noted(op))
    tower(tiles_of(tower.config), None, None)
    groups = [[cast(NF4Tensor, member.frozen_weight()) for member in group] for group in tower.blocks()[0].groups()]
    assert together == [[weight.codes.data_ptr() for weight in group] for group in groups]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_compute_the_same(family: str) -> None:
    """In the interpreter: forward and backward of two blocks, everything trained."""
    tower = tower_of(config_of(family, select_layer=2))
    tiles = tiles_of(tower.config, 1)
    features = tower(tiles, None, None)
    found = gradients(tower, features)
    set_backend("reference")
    expected = tower(tiles, None, None)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(tower, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)
