"""Every language model with every tower and every way to train, at tiny size: three steps, and the loss falls.

`make test` takes the combinations in which every two choices meet, `make test-all` all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
from models.adapters.names import is_adapter
from models.language.decoder import DecoderConfig
from models.language.llama import LlamaConfig
from models.language.phi import PhiConfig
from models.language.phi3 import Phi3Config
from models.language.stablelm import StableLMConfig
from models.pack import Pack
from models.placement import fill
from models.projector import ProjectorConfig
from models.vision.clip import ClipConfig
from models.vision.eva import EvaConfig
from models.vision.siglip import SiglipConfig
from models.vision.tower import TowerConfig
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models.tiny import tiny_model

CPU = torch.device("cpu")
VOCAB, DIM = 61, 32
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "dim": DIM, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 52,
}  # fmt: skip
LANGUAGE: dict[str, DecoderConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-3": LlamaConfig(**SHAPE | {"num_kv_heads": 2}, rope_theta=5e5, rope_interleaved=False),
    "phi-1.5": PhiConfig(**SHAPE, norm_eps=1e-5, rotary_dim=4, residual_dropout=0.0),
    "phi-2": PhiConfig(**SHAPE, norm_eps=1e-5, rotary_dim=2, residual_dropout=0.1),
    "phi-3": Phi3Config(**SHAPE, norm_eps=1e-5, window=9),
    "stablelm-2": StableLMConfig(**SHAPE, norm_eps=1e-5, rotary_dim=2),
}
TOWER: dict[str, Any] = {"width": 24, "num_layers": 6, "num_heads": 3, "patch_size": 4, "image_size": 12, "mlp_dim": 40}
VISION: dict[str, TowerConfig] = {
    "clip-224": ClipConfig(**TOWER),  # LaVIN's: class tokens
    "clip-336": ClipConfig(**TOWER, select_feature="patch"),
    "eva": EvaConfig(**TOWER | {"num_heads": 2}),
    "siglip": SiglipConfig(**TOWER | {"image_size": 14}),
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
        stream = ((n, p.data) for n, p in base.get_submodule(part).named_parameters() if not is_adapter(n))
        fill(
            model.get_submodule(part), stream, bits=partial(_bits, bits), device=CPU, dtype=torch.float32, source="test"
        )
    return model.train()


def _bits(bits: int, name: str) -> int:
    return 16 if name == "head.weight" else bits


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
