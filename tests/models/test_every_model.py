"""Every language model with every tower and every way to train, at tiny size: three steps, and the loss falls.

`make test` takes the combinations in which every two choices meet, `make test-all` all of them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.packing import collate, form_of, token_weights
from engine.data.sample import IGNORE, Sample
from engine.distributed import Ranks
from engine.optim import Optimizer
from engine.scaler import LossScaler
from engine.step import train_step
from models.adapters.lora import LoRAConfig
from models.adapters.mma import AdapterConfig
from models.pack import Pack
from models.projector import ProjectorConfig
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models import shapes
from tests.models.drawn import CPU, filled, frozen_tensors
from tests.models.shapes import VOCAB
from tests.models.tiny import tiny_model

LANGUAGE = {
    "llama": shapes.language("llama"),
    "llama-3": shapes.language("llama-3"),
    "phi-1.5": shapes.language("phi", residual_dropout=0.0),
    "phi-2": shapes.language("phi", rotary_dim=2, residual_dropout=0.1),
    "phi-3": shapes.language("phi3", window=9),
    "stablelm-2": shapes.language("stablelm"),
}
VISION = {
    "clip-224": shapes.tower("clip", num_layers=6, select_feature="class_tokens"),  # LaVIN's
    "clip-336": shapes.tower("clip"),
    "eva": shapes.tower("eva"),
    "siglip": shapes.tower("siglip", image_size=14),
}
TRAINING = (*product(("projector", "mma", "lora"), (16, 8, 4)), ("full", 16))
COMBINATIONS = list(product(LANGUAGE, VISION, TRAINING))


def is_pairwise(language: str, vision: str, training: tuple[str, int]) -> bool:
    """One tower for each language model and way to train, shifted so that it meets all of both."""
    place = list(LANGUAGE).index(language) + TRAINING.index(training)
    return list(VISION)[place % len(VISION)] == vision


def parameters() -> list[Any]:
    found = []
    for language, vision, training in COMBINATIONS:
        marks = () if is_pairwise(language, vision, training) else pytest.mark.sweep
        label = f"{language}-{vision}-{training[0]}-{training[1]}bit"
        found.append(pytest.param(language, vision, *training, id=label, marks=marks))
    return found


def test_every_two_choices_meet() -> None:
    chosen = [combination for combination in COMBINATIONS if is_pairwise(*combination)]
    assert len(chosen) < len(COMBINATIONS) / 3
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert {(c[first], c[second]) for c in chosen} == {(c[first], c[second]) for c in COMBINATIONS}


def config_of(language: str, vision: str, training: str) -> VLMConfig:
    trained = {"projector": ("frozen", "frozen"), "mma": ("mma", "mma"), "lora": ("lora", "frozen")}
    of_language, of_vision = trained.get(training, ("full", "full"))
    tower = VISION[vision]
    kind = "lavin" if tower.select_feature == "class_tokens" else "mlp2x_gelu"
    return VLMConfig(
        language=LANGUAGE[language], vision=tower, projector=ProjectorConfig(kind=kind, hidden=20),
        adapter=AdapterConfig(dim=8), lora=LoRAConfig(rank=4, alpha=8.0), train_language=of_language,
        train_vision=of_vision,
    )  # fmt: skip


def model_of(config: VLMConfig, bits: int) -> VisionLanguageModel:
    """Random base weights stored in `bits`, what trains at its start: as engine/build.py makes it."""
    base = tiny_model(replace(config, train_language="frozen", train_vision="frozen"))
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    model.start_trainable(0, CPU)
    for part in ("language", "vision"):
        tensors = frozen_tensors(base.get_submodule(part))
        filled(model.get_submodule(part), tensors, lambda name: 16 if name == "head.weight" else bits)
    return model.train()


def pack_of(config: VLMConfig) -> Pack:
    """A text, and two samples with a picture each; every sample ends in targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = config.tokens_per_tile
    samples, tiles = [], list[Tensor | None]()
    for number, (length, has_image) in enumerate(((12, False), (19, True), (23, True))):
        slots = list(range(2, 2 + tokens)) if has_image else []
        ids = torch.randint(1, VOCAB, (length + len(slots),), generator=generator).tolist()
        labels = [IGNORE] * (len(ids) - 8) + ids[-8:]
        for slot in slots:
            ids[slot] = 0
        samples.append(Sample(str(number), ids, labels, image=None, image_slots=slots, truncated=False))
        side = config.vision.image_size
        tiles.append(torch.randn(3, side, side, generator=generator) if has_image else None)
    return collate(samples, token_weights(samples, "token"), tiles, form=form_of(config))


@pytest.mark.parametrize(("language", "vision", "training", "bits"), parameters())
def test_three_steps(language: str, vision: str, training: str, bits: int) -> None:
    config = config_of(language, vision, training)
    model = model_of(config, bits)
    pack = pack_of(config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    with torch.no_grad():
        first = model(pack).item()
    optimizer = Optimizer(model.trainable().items(), weight_decay=0.0)
    for step in range(3):
        result = train_step(
            model, [pack], optimizer, LossScaler(enabled=False), Ranks(rank=0, local_rank=0, world=1), step=step,
            seed=0, lr=1e-2 if training != "full" else 1e-3, clip_grad=None, device=CPU,
        )  # fmt: skip
        assert result.grad_norm > 0
    with torch.no_grad():
        assert model(pack).item() < first - 1e-3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not [name for name, p in model.trainable().items() if torch.equal(p, before[name])]
