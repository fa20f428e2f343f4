"""What layers keep for their backward pass: what a policy says, and for the same loss and gradients, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias, cast

import pytest
import torch
from torch import Tensor, nn

from kernels import dispatch
from kernels.norm_mma import add_norm_mma
from models.language import decoder
from models.pack import Pack
from models.recompute import POLICIES, ActivationPolicy, Policy, check_policy, recomputed
from models.vision import tower
from models.vlm import Legacy, VisionLanguageModel
from tests.models.kept import Shape, kept_by, rows_kept
from tests.models.tiny import gradients, packed_copy, packs_of, random_samples, tiny_config, tiny_model

LAYERS, BLOCKS = 3, 6
TOKENS = 2 + 13 + 9  # of the pack: T
MIXED = ActivationPolicy(
    ("keep_input", "recompute_mlp", "save_all"),
    ("keep_input", "save_all", "recompute_mlp", "keep_input", "keep_input", "recompute_mlp"),
)
EVERY = [*(ActivationPolicy.uniform(policy, LAYERS, BLOCKS) for policy in POLICIES), MIXED]
SEED = torch.tensor([5])
Outputs: TypeAlias = tuple[Tensor, ...]
CONFIGS = {
    "attn": tiny_config(dropout=0.5, drop_path=0.3),
    "block": tiny_config(language_placement="block", vision_placement="router_block", dropout=0.5),
    "normal": tiny_config(vision_placement="normal", dropout=0.5),
    "full": tiny_config(train_language="full", train_vision="full"),
    "frozen tower": tiny_config(train_vision="frozen"),
    "frozen language": tiny_config(train_language="frozen"),
    "early routing": tiny_config(language_placement="block", legacy=Legacy(block_routing=True)),
}


@pytest.fixture
def triton_backend() -> Iterator[None]:
    previous = dispatch.set_backend("triton")
    yield
    dispatch.set_backend(previous)


def a_pack() -> Pack:
    """Without the segment that fills it up: each row costs the interpreter time."""
    samples, tiles = random_samples([(13, True), (9, False)])
    pack = packs_of(samples, tiles)[0][1]
    bounds = pack.segments.cu_seqlens[:-1]
    segments = replace(
        pack.segments, cu_seqlens=bounds, position_ids=pack.segments.position_ids[:TOKENS],
        router_row=pack.segments.router_row[:TOKENS],
    )  # fmt: skip
    assert bounds[-1] == TOKENS
    return replace(pack, input_ids=pack.input_ids[:TOKENS], segments=segments)


def results(model: VisionLanguageModel, policy: ActivationPolicy) -> dict[str, Tensor]:
    model.use_activation_policy(policy)
    loss = model(a_pack(), SEED)
    return gradients(loss, dict(model.named_parameters())) | {"loss": loss.detach()}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_policy_changes_a_bit(name: str) -> None:
    model = tiny_model(CONFIGS[name])
    expected = results(model, EVERY[0])
    for policy in EVERY[1:]:
        found = results(model, policy)
        assert [n for n, value in expected.items() if not torch.equal(found[n], value)] == []
    assert all(value.any() for n, value in expected.items() if "router" not in n)


def in_four_bits(part: str, name: str) -> int:
    return 4 if part == "language" and (".mlp." in name or ".attention." in name) else 16


D, F = 32, 48  # of the language model
P, W, M = 10, 24, 40  # of the tower: tokens of a tile, widths
# x1, x2, q, k, v, o, gate, up and small vectors (performance.md 2.13); without gate and up; one stream
LANGUAGE = {
    "save_all": {(TOKENS, D): 2, (TOKENS, 1, D): 4, (TOKENS, F): 2},
    "recompute_mlp": {(TOKENS, D): 2, (TOKENS, 1, D): 4},
    "keep_input": {(TOKENS, D): 1},
}
TOWER = {
    "save_all": {(P, W): 2, (P, 3, W // 3): 4, (P, M): 1},
    "recompute_mlp": {(P, W): 2, (P, 3, W // 3): 4},
    "keep_input": {(P, W): 1},
}


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(("part", "expected"), [("language", LANGUAGE), ("vision", TOWER)])
def test_what_a_layer_keeps_with_the_kernels_and_that_it_changes_no_bit(
    part: str, expected: dict[Policy, dict[Shape, int]]
) -> None:
    """In the interpreter, one layer behind another, packed weights in the language model."""
    shape = replace(CONFIGS["block"].language, num_heads=1, num_kv_heads=1)
    model = packed_copy(tiny_model(replace(CONFIGS["block"], language=shape)), in_four_bits)
    pack, generator = a_pack(), torch.Generator().manual_seed(2)
    context: decoder.Context | tower.Context
    if part == "language":
        block, size = model.language.layers[1], (TOKENS, D)
        rope = model.language.rope_table(2 * TOKENS, torch.device("cpu"))
        context = decoder.Context(segments=pack.segments, router_rows=pack.modality_rows, rope=rope, seed=SEED)
    else:
        block, size = model.vision.layers[1], (P, W)
        bounds = torch.tensor([0, P], dtype=torch.int32)
        context = tower.Context(cu_seqlens=bounds, num_tokens=P, router=None, seed=SEED)
    x, delta, *grads = (torch.randn(size, generator=generator, requires_grad=True) for _ in range(4))
    inputs = [x, delta, *(p for p in block.parameters() if p.requires_grad)]
    results: list[Outputs] = []
    for policy in POLICIES:
        block.policy = policy  # type: ignore[assignment]
        outputs, kept = kept_by(model, lambda: cast(Outputs, block(x, delta, context)))
        assert rows_kept(kept, size[0]) == expected[policy], policy
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, grads)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_frozen_tower_keeps_nothing() -> None:
    model = tiny_model(CONFIGS["frozen tower"])
    for policy in EVERY:
        model.use_activation_policy(policy)
        _, kept = kept_by(model, lambda: (model(a_pack(), SEED),))
        assert kept and not [shape for shape in kept if W in shape and shape[0] == P]


def test_without_gradients_nothing_is_kept() -> None:
    model = tiny_model(CONFIGS["attn"])
    model.use_activation_policy(MIXED)
    with torch.no_grad():
        assert not model(a_pack(), SEED).requires_grad


def test_the_last_product_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(CONFIGS["attn"])
    model.use_activation_policy(EVERY[2])
    down = [module for name, module in model.named_modules() if name.endswith(".mlp.down")]
    calls = Counter[int]()
    for layer in model.modules():
        layer.register_forward_hook(lambda module, *_: calls.update([id(module)]))
    model(a_pack(), SEED).backward()
    assert [calls[id(layer)] for layer in down] == [1] * (LAYERS + BLOCKS)
    assert calls[id(model.language.blocks()[0].attention.o)] == 2


@pytest.mark.parametrize("trained", [{"train_vision": "frozen"}, {"train_projector": "frozen"}], ids=str)
def test_a_pack_without_images_has_a_backward_pass_whatever_learns(trained: dict[str, str]) -> None:
    """Where the language model is frozen its loss depends on nothing that learns: gradients are zero or none."""
    model = tiny_model(tiny_config(train_language="frozen", **trained))
    samples, tiles = random_samples([(9, False)])
    for policy in EVERY:
        model.use_activation_policy(policy)
        loss = model(packs_of(samples, tiles)[0][1], SEED)
        with torch.no_grad():
            assert torch.equal(loss, model(packs_of(samples, tiles)[0][1], SEED))
        loss.backward()
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_policy_as_text_and_data() -> None:
    assert MIXED.describe() == (
        "language: keep_input x 1, recompute_mlp x 1, save_all x 1; "
        "vision: keep_input x 1, save_all x 1, recompute_mlp x 1, keep_input x 2, recompute_mlp x 1"
    )
    assert ActivationPolicy.from_json(MIXED.to_json()) == MIXED
    wrongs: list[object] = [{}, [], {"language": ["save_all"]}, {"language": ["none"], "vision": []}, None]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="policy"):
            ActivationPolicy.from_json(wrong)
    with pytest.raises(ValueError, match="save_all, recompute_mlp, keep_input"):
        check_policy("all")


def test_a_model_says_its_policy_and_takes_none_of_another_size() -> None:
    model = tiny_model(CONFIGS["attn"])
    assert model.activation_policy == EVERY[0]
    model.use_activation_policy(MIXED)
    assert model.activation_policy == MIXED
    with pytest.raises(ValueError, match="another model than one of 3 layers and a tower of 6"):
        model.use_activation_policy(ActivationPolicy.uniform("save_all", 2, 6))
    assert model.activation_policy == MIXED


def test_a_recomputation_has_the_gradients_of_all_that_it_uses() -> None:
    """Against autograd itself, for each subset of the inputs that wants a gradient and of the outputs that has one."""
    generator = torch.Generator().manual_seed(0)
    x0, d0, w0, dy0, dz0 = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(5))

    def body(x: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
        stream = x if delta is None else x + delta
        return stream, stream, stream.sin() @ weight

    for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        x, delta, weight = (nn.Parameter(t, bool(on)) for t, on in zip((x0, d0, w0), wanted, strict=True))
        leaves = [t for t in (x, delta, weight) if t.requires_grad]
        for dy, dz in ((dy0, dz0), (None, dz0), (dy0, None)):
            if dz is None and not (wanted[0] or wanted[1]):
                continue
            both = []
            for y, z in (body(x, delta)[1:], recomputed(body, None, x, delta, [weight])):
                given = [(out, grad) for out, grad in ((y, dy), (z, dz)) if grad is not None and out.requires_grad]
                outs, grads = zip(*given, strict=True)
                both.append(torch.autograd.grad(outs, leaves, grads, allow_unused=True))
            for expected, found in zip(*both, strict=True):
                assert (expected is None and found is None) or torch.equal(expected, found)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_adapter_of_a_stream_is_that_of_its_two_parts(dtype: torch.dtype) -> None:
    """Recomputation begins with the sum; rows of several tiles."""
    generator = torch.Generator().manual_seed(1)
    x, delta = (torch.randn(3, 2200, generator=generator).to(dtype) for _ in range(2))
    shapes = (8, 2200), (8,), (2200, 4), (2200,), (2200, 4), (2200,)
    down_w, down_b, up0_w, up0_b, up1_w, up1_b = (torch.randn(shape, generator=generator) / 9 for shape in shapes)
    weight, mix, row = torch.ones(2200, dtype=dtype), torch.full((1, 2), 0.5), torch.zeros(3, dtype=torch.int32)

    def adapted(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm_mma(
            x, delta, weight, None, 1e-6, down_w, down_b, up0_w, up0_b, up1_w, up1_b, mix, row, scale=1.0, as_sum=True
        )  # fmt: skip

    stream, y = adapted(x, delta)
    again, y_again = adapted(stream, None)
    assert torch.equal(again, stream) and torch.equal(y_again, y)
