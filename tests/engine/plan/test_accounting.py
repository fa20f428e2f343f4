"""engine/plan/accounting.py against runs that are counted: each buffer, each saved tensor, each policy, to the byte."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from engine.plan.accounting import Costs, costs
from engine.plan.memory_budget import HOST, _stages
from engine.plan.meta_model import TAPPED_BLOCKS, Bits
from kernels import unpacked
from kernels.dispatch import set_backend
from models.adapters.lora import LoRAConfig
from models.language.llama import LlamaConfig
from models.language.phi import PhiConfig
from models.language.stablelm import StableLMConfig
from models.projector import ProjectorConfig
from models.recompute import POLICIES, ActivationPolicy, Policy
from models.vision.clip import ClipConfig
from models.vision.eva import EvaConfig
from models.vision.siglip import SiglipConfig
from models.vlm import VLMConfig
from tests.engine.plan.counted_run import (
    SHAPE,
    interpreted,
    most_allocated,
    real_model,
    real_pack,
    saved_bytes,
)

INTERPRETER = 0  # as a compute capability
LAYERS, BLOCKS = 4, 6
CONFIG = VLMConfig(
    language=LlamaConfig(vocab_size=96, dim=32, num_layers=LAYERS, num_heads=2, num_kv_heads=2, ffn_dim=64),
    vision=ClipConfig(width=16, num_layers=BLOCKS, num_heads=1, patch_size=4, image_size=8, mlp_dim=32),
    projector=ProjectorConfig(hidden=16),
)
# so small that a tower's peak is the highest
SMALL = LlamaConfig(vocab_size=96, dim=16, num_layers=2, num_heads=1, num_kv_heads=1, ffn_dim=16)
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Our own kernels on the CPU; indirect parameter: whether they compute."""
    before = set_backend("auto")
    try:
        with interpreted(bodies=getattr(request, "param", False)):
            yield
    finally:
        set_backend(before)
        unpacked.release()


def counted(config: VLMConfig, bits: Bits, tiles: int) -> Costs:
    return costs(config, bits, replace(SHAPE, tiles=tiles), torch.float32, INTERPRETER)


def peaks(config: VLMConfig, bits: Bits, tiles: int, policies: Sequence[ActivationPolicy]) -> list[int]:
    """Of one pass under each policy, by the allocator's events."""
    model, pack, seed = real_model(config, bits), real_pack(config, tiles), torch.ones(1, dtype=torch.int64)
    with torch.no_grad():
        model(pack, seed)  # tables and the buffer of unpacked weights
    found = []
    for policy in policies:
        model.use_activation_policy(policy)
        unpacked.forget()
        found.append(most_allocated(lambda: model(pack, seed).backward()))
    return found


UNIFORM = [ActivationPolicy.uniform(policy, LAYERS, BLOCKS) for policy in POLICIES]


@needs_interpreter
@pytest.mark.parametrize("tiles", [0, 2])
@pytest.mark.parametrize("width", [16, 8, 4])
@pytest.mark.usefixtures("kernels")
def test_the_peak_of_a_pass_is_what_the_allocator_saw(width: int, tiles: int) -> None:
    bits = Bits(width, width, width)
    predicted = counted(CONFIG, bits, tiles)
    assert peaks(CONFIG, bits, tiles, UNIFORM) == [predicted.peak(policy) for policy in UNIFORM]


@needs_interpreter
@pytest.mark.parametrize("kernels", [True], indirect=True)
@pytest.mark.usefixtures("kernels")
def test_kernels_that_compute_take_no_more() -> None:
    config = replace(CONFIG, language=replace(CONFIG.language, num_layers=2))
    everything = ActivationPolicy.uniform("save_all", 2, BLOCKS)
    assert peaks(config, Bits(), 0, [everything]) == [counted(config, Bits(), 0).peak(everything)]


@needs_interpreter
@pytest.mark.parametrize(
    "options",
    [{"language_placement": "block"}, {"vision_placement": "router_block"}, {"train_vision": "frozen"}],
    ids=lambda options: next(iter(options.values())),
)
@pytest.mark.usefixtures("kernels")
def test_other_placements(options: dict[str, Any]) -> None:
    config = replace(CONFIG, **options)
    predicted = counted(config, Bits(), 2)
    assert peaks(config, Bits(), 2, UNIFORM) == [predicted.peak(policy) for policy in UNIFORM]


LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.05)
PATCHES = {"patch_size": 4, "image_size": 12, "mlp_dim": 32, "num_layers": BLOCKS + 1, "num_heads": 1}  # 9 of them
OTHERS = {
    "Phi and SigLIP, LoRA": VLMConfig(
        language=PhiConfig(vocab_size=96, dim=32, num_layers=LAYERS, num_heads=2, num_kv_heads=2, ffn_dim=64,
                           rotary_dim=8, residual_dropout=0.1),
        vision=SiglipConfig(width=16, **PATCHES), projector=ProjectorConfig(kind="mlp2x_gelu"), lora=LORA,
        train_language="lora", train_vision="frozen",
    ),
    "LLaMA and CLIP patches, projector": VLMConfig(
        language=CONFIG.language, vision=ClipConfig(width=16, select_feature="patch", **PATCHES),
        projector=ProjectorConfig(kind="linear"), train_language="frozen", train_vision="frozen",
    ),
    "StableLM and EVA, LoRA in both": VLMConfig(
        language=StableLMConfig(vocab_size=96, dim=32, num_layers=LAYERS, num_heads=2, num_kv_heads=2, ffn_dim=64,
                                rotary_dim=8),
        vision=EvaConfig(width=16, **PATCHES), projector=ProjectorConfig(kind="mlp2x_gelu"), lora=LORA,
        vision_lora=LORA, train_language="lora", train_vision="lora",
    ),
}  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize(("width", "tiles"), [(16, 2), (4, 2), (16, 0)])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.usefixtures("kernels")
def test_other_models(name: str, width: int, tiles: int) -> None:
    config, bits = OTHERS[name], Bits(width, 16, width)
    predicted = counted(config, bits, tiles)
    assert config.vision.layers_run == BLOCKS
    assert peaks(config, bits, tiles, UNIFORM) == [predicted.peak(policy) for policy in UNIFORM]


@needs_interpreter
@pytest.mark.usefixtures("kernels")
def test_a_tower_that_sees_two_sizes() -> None:
    base = OTHERS["Phi and SigLIP, LoRA"]
    config = replace(base, vision=replace(base.vision, scales=(12, 24)), train_vision="lora", vision_lora=LORA)
    predicted = counted(config, Bits(), 2)
    assert peaks(config, Bits(), 2, UNIFORM) == [predicted.peak(policy) for policy in UNIFORM]


@needs_interpreter
@pytest.mark.usefixtures("kernels")
def test_a_tower_with_lora_whose_peak_is_the_highest() -> None:
    config = replace(OTHERS["StableLM and EVA, LoRA in both"], language=SMALL)
    config = replace(config, vision=replace(config.vision, width=64, mlp_dim=256, num_layers=10, image_size=8))
    policies = [ActivationPolicy.uniform(policy, 2, 9) for policy in POLICIES]
    predicted = counted(config, Bits(), 4)
    assert peaks(config, Bits(), 4, policies) == [predicted.peak(policy) for policy in policies]


@needs_interpreter
@pytest.mark.usefixtures("kernels")
def test_the_adapter_without_a_router() -> None:
    """Its numbers (scale, dropout) are tensors of 8 bytes to autograd: on the host, where a GPU computes."""
    config = replace(CONFIG, vision_placement="normal")
    predicted = counted(config, Bits(), 2)
    for policy, seen in zip(UNIFORM, peaks(config, Bits(), 2, UNIFORM), strict=True):
        assert 0 <= seen - predicted.peak(policy) <= 2 * 8 * BLOCKS


def mixed(config: VLMConfig, number: int) -> list[ActivationPolicy]:
    rng = random.Random(0)
    sizes = config.language.num_layers, config.vision.num_layers
    return [ActivationPolicy(*(tuple(rng.choices(POLICIES, k=size)) for size in sizes)) for _ in range(number)]


# The language model is so small that the tower's peak is the highest, and there are blocks between its taps.
TOWER = replace(CONFIG, language=SMALL, vision=replace(CONFIG.vision, width=64, mlp_dim=256, num_layers=14))


@needs_interpreter
@pytest.mark.usefixtures("kernels")
def test_any_policies_have_the_peak_that_the_allocator_saw() -> None:
    """The last layer alone recomputing less than the one before it, above all: what that hands on is alive besides."""
    last_alone = ("keep_input", "keep_input", "keep_input")
    policies = [
        ActivationPolicy((*last_alone, "recompute_mlp"), ("save_all",) * BLOCKS),
        ActivationPolicy((*last_alone, "save_all"), ("keep_input",) * BLOCKS),
        *mixed(CONFIG, 10),
    ]
    predicted = counted(CONFIG, Bits(), 2)
    assert peaks(CONFIG, Bits(), 2, policies) == [predicted.peak(policy) for policy in policies]


@needs_interpreter
@pytest.mark.parametrize("train", ["mma", "frozen"])
@pytest.mark.usefixtures("kernels")
def test_the_peak_of_a_deep_tower_is_what_the_allocator_saw(train: Literal["mma", "frozen"]) -> None:
    """Composed of fewer blocks than it has."""
    config = replace(TOWER, train_vision=train)
    policies = [ActivationPolicy.uniform(policy, 2, 14) for policy in POLICIES] + mixed(config, 3)
    predicted = counted(config, Bits(), 4)
    assert config.vision.num_layers > TAPPED_BLOCKS
    assert peaks(config, Bits(), 4, policies) == [predicted.peak(policy) for policy in policies]
    lean = ("keep_input",) * 14
    either = {predicted.peak(ActivationPolicy((policy,) * 2, lean)) for policy in POLICIES}
    assert len(either) == 1, "the tower's is the highest"


@needs_interpreter
@pytest.mark.usefixtures("kernels")
def test_a_layer_keeps_what_autograd_saves() -> None:
    predicted = counted(CONFIG, Bits(16, 16, 16), 2)
    seed = torch.ones(1, dtype=torch.int64)
    found = {(policy, layers): _saved(policy, layers, seed) for layers in (1, 2) for policy in POLICIES}
    for policy in POLICIES:
        grown = found[policy, 2] - found[policy, 1]
        assert grown == predicted.language.choices[policy].saved, policy


def _saved(policy: Policy, layers: int, seed: torch.Tensor) -> int:
    config = replace(CONFIG, language=replace(CONFIG.language, num_layers=layers))
    model, pack = real_model(config, Bits(16, 16, 16)), real_pack(config, 0)
    model.use_activation_policy(ActivationPolicy.uniform(policy, layers, BLOCKS))
    with torch.no_grad():
        model(pack, seed)
    return saved_bytes(lambda: model(pack, seed), {p.untyped_storage().data_ptr() for p in model.parameters()})


def test_a_frozen_tower_keeps_nothing() -> None:
    frozen = counted(replace(CONFIG, train_vision="frozen"), Bits(), 2)
    assert {choice.saved for choice in frozen.vision.choices.values()} == {0}


def test_less_is_kept_by_each_policy_and_more_is_computed() -> None:
    predicted = counted(CONFIG, Bits(), 2)
    for layers in _stages(predicted, HOST):
        choices = [layers.choices[policy] for policy in POLICIES]
        assert choices[0].saved > choices[1].saved > choices[2].saved > 0
        assert 0 == choices[0].seconds < choices[1].seconds < choices[2].seconds
        assert all(choice.peak >= choice.saved for choice in choices)


def test_a_published_figure() -> None:
    """LLaMA-7B in bf16 keeps 93,320 bytes a token and layer, without adapters (performance anchors of the project)."""
    config = VLMConfig(language=LlamaConfig(), vision=CONFIG.vision, train_vision="frozen")
    shape = replace(SHAPE, tokens=2048, supervised=1408, segments=10, tiles=0)
    saved = costs(config, Bits(), shape, torch.bfloat16, INTERPRETER).language.choices["save_all"].saved / shape.tokens
    assert 93_320 <= saved < 93_320 * 1.003  # with the adapter's codes
