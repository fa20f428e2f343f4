"""Small joint models of LaVIN's with every tensor random, and random samples in LaVIN's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.data.packing import LAVIN, PackForm, Reduction, collate, first_of_micro_batch, form_of, token_weights
from engine.data.planning import plan_packs
from engine.data.sample import IGNORE, Sample
from models.adapters.mma import AdapterConfig
from models.pack import Pack
from models.projector import ProjectorConfig
from models.recompute import ActivationPolicy
from models.vlm import Legacy, VisionLanguageModel, VLMConfig
from tests.models.drawn import CPU, drawn, filled, frozen_tensors
from tests.models.shapes import SIDE, VOCAB, language, tower

IMAGE_SIZE = SIDE
NUM_IMAGE_TOKENS = 6
FIRST_SLOT = 4  # BOS and a prefix of three tokens come before the image


def tiny_config(*, ffn_dim: int = 48, num_layers: int = 3, dropout: float = 0.1, **options: Any) -> VLMConfig:
    """A joint model that answers in milliseconds; `options` are VLMConfig's."""
    return VLMConfig(
        language=language("llama", num_layers=num_layers, ffn_dim=ffn_dim),
        vision=tower("clip", num_layers=6, select_feature="class_tokens"),
        adapter=AdapterConfig(dim=8, scale=0.7, temperature=2.0, dropout=dropout),
        projector=ProjectorConfig(hidden=20),
        **options,
    )


MICRO_BATCH = 3
# Micro-batch 0 starts with a text sample, 1 with an image, 2 has no image at all, 3 is a single sample.
LAYOUT = [
    (9, False), (31, True), (17, False), (44, True), (12, True), (60, False), (23, False), (70, False), (8, False),
    (13, True),
]  # fmt: skip
TEXT_ONLY = [(9, False), (40, False), (3, False), (2, False)]

PLACEMENTS = [
    tiny_config(language_placement=language, vision_placement=vision, ffn_dim=ffn_dim)
    for language in ("attn", "block")
    for vision, ffn_dim in (("router", 48), ("router_block", 37), ("normal", 48))
]
LEGACY = [
    tiny_config(legacy=Legacy(clip_router=True)),
    tiny_config(vision_placement="router_block", legacy=Legacy(clip_router=True)),
    tiny_config(vision_placement="normal", legacy=Legacy(normal_adapter=True)),
    tiny_config(language_placement="block", legacy=Legacy(block_routing=True)),
    tiny_config(
        language_placement="block",
        vision_placement="router_block",
        legacy=Legacy(clip_router=True, block_routing=True, normal_adapter=True),
    ),
]


def label(config: VLMConfig) -> str:
    switches = [name for name in Legacy.__slots__ if getattr(config.legacy, name)]
    trained = [config.train_language, config.train_vision]
    return "-".join([config.language_placement, config.vision_placement, *switches, *trained])


def tiny_model(config: VLMConfig, seed: int = 0) -> VisionLanguageModel:
    """The model in fp32, for evaluation, with every tensor drawn anew."""
    return drawn(VisionLanguageModel(config), seed).eval()


def packed_copy(
    source: VisionLanguageModel, bits: Callable[[str, str], int], *, dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> VisionLanguageModel:  # fmt: skip
    """`source` with its linears stored in `bits` of (part, name within the part): as loading fills a model."""
    with torch.device("meta"):
        model = VisionLanguageModel(source.config)
    if checkpointing:
        layers = len(model.language.layers), len(model.vision.layers)
        model.use_activation_policy(ActivationPolicy.uniform("keep_input", *layers))
    model.start_trainable(0, CPU)
    for part in ("language", "vision"):
        filled(model.get_submodule(part), frozen_tensors(source.get_submodule(part)), partial(bits, part), dtype)
    for name, parameter in source.trainable().items():
        model.get_parameter(name).data.copy_(parameter)
    return model.eval()


def random_samples(layout: Sequence[tuple[int, bool]], seed: int = 0) -> tuple[list[Sample], list[Tensor | None]]:
    """One sample for each (length, has an image); targets from somewhere behind the image to the end."""
    generator = torch.Generator().manual_seed(seed)
    samples, tiles = [], list[Tensor | None]()
    for number, (length, has_image) in enumerate(layout):
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        slots = list(range(FIRST_SLOT, FIRST_SLOT + NUM_IMAGE_TOKENS)) if has_image else []
        for slot in slots:
            ids[slot] = 0
        prompt = int(torch.randint(1 + max(slots, default=0), length, (), generator=generator))
        labels = [IGNORE] * prompt + ids[prompt:]
        samples.append(Sample(str(number), ids, labels, image=None, image_slots=slots, truncated=False))
        tiles.append(torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) if has_image else None)
    return samples, tiles


def packs_of(
    samples: Sequence[Sample], tiles: Sequence[Tensor | None], *, reduction: Reduction = "token", micro_batch: int = 1,
    tokens_per_batch: int = 128, plan: Sequence[Sequence[int]] | None = None, legacy_clip_router: bool = False,
    form: PackForm = LAVIN,
) -> list[tuple[list[int], Pack]]:  # fmt: skip
    """A step's packs as the loader makes them, each with its samples' places in the step."""
    weights = token_weights(samples, reduction, micro_batch)
    packs = []
    lengths = [len(s.input_ids) for s in samples]
    for members in plan or plan_packs(lengths, tokens_per_batch, modality=form.modality):
        routed_by, outside = first_of_micro_batch(members, micro_batch) if legacy_clip_router else (None, [])
        pack = collate(
            [samples[i] for i in members], [weights[i] for i in members], [tiles[i] for i in members],
            routed_by=routed_by, outside=[tiles[i] for i in outside], form=form,
        )  # fmt: skip
        packs.append((list(members), pack))
    return packs


def step_loss(
    model: VisionLanguageModel, reduction: Reduction = "micro_batch", layout: list[tuple[int, bool]] = LAYOUT,
    plan: list[list[int]] | None = None, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of a whole step, summed over its packs."""
    samples, tiles = random_samples(layout)
    packs = packs_of(
        samples, tiles, reduction=reduction, micro_batch=MICRO_BATCH, plan=plan,
        legacy_clip_router=model.config.legacy.clip_router, form=form_of(model.config),
    )  # fmt: skip
    device = next(model.parameters()).device
    return torch.stack([model(pack.to(device), seed) for _, pack in packs]).sum()


def gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d loss / d each tensor that learns; zeros where the loss does not reach it. The graph is kept."""
    learns = {name: weight for name, weight in weights.items() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(learns.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if grad is None else grad
        for (name, weight), grad in zip(learns.items(), found, strict=True)
    }


def assert_close(got: Tensor, expected: Tensor, what: str, *, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """The largest error is at most `tolerance`, and at most `tolerance` of the largest value expected (+ `floor`)."""
    assert got.shape == expected.shape and got.numel(), f"{what}: got {got.shape}, expected {expected.shape}"
    error = (got.double().cpu() - expected.double().cpu()).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= min(tolerance, tolerance * largest + floor), f"{what}: off by {error:.1e}, largest {largest:.1e}"


def assert_gradients_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = 1e-5, floor: float = 0.0
) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(got[name], gradient, f"gradient of {name}", tolerance=tolerance, floor=floor)
