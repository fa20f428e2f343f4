"""Packs without modality rows through a model: how samples are packed and filled up changes no loss and no gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.data.anyres import Anyres
from engine.data.image_processor import processor_of
from engine.data.images import TileReader
from engine.data.layout import Layout
from engine.data.loader import StepLoader
from engine.data.packing import form_of
from engine.data.sample import Sample
from engine.data.sampler import StepSampler
from engine.data.tokenizer import Tokenizer
from models.projector import ProjectorConfig
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models.drawn import drawn
from tests.models.shapes import language, tower

SIZE = 8
PIECES = 400  # of the tokenizer
PHI = VLMConfig(
    language=language("phi", vocab_size=PIECES, residual_dropout=0.0), vision=tower("siglip", image_size=SIZE),
    projector=ProjectorConfig(kind="mlp2x_gelu"), train_language="frozen", train_vision="frozen",
)  # fmt: skip
LLAMA = VLMConfig(
    language=language("llama", vocab_size=PIECES), vision=tower("clip", image_size=SIZE),
    projector=ProjectorConfig(kind="linear"), train_language="frozen", train_vision="full", image_newline=True,
)  # fmt: skip
ANYRES = Anyres(tile=SIZE, tokens=4, merge="spatial_unpad")


class Pictures:
    """Six rows, four of them with a picture."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.paths: list[str | None] = [None] * 6
        for i, size in enumerate([(8, 8), (20, 7), (5, 30), (16, 16)]):
            noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(i))
            Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{i}.png")
            self.paths[i] = str(folder / f"{i}.png")

    def __len__(self) -> int:
        return len(self.paths)

    def sample(self, index: int) -> Sample:
        return self.layout.pair(str(index), "Question: " + "why " * index, "The answer is A.", self.paths[index])

    def where(self, index: int) -> str:
        return f"row {index}"


def step(
    config: VLMConfig, data: Pictures, tokens: int, *, few_shapes: bool, ranks: int = 1
) -> tuple[int, Tensor, list[Tensor]]:
    """Number of packs, loss and gradients of a step over all rows, summed up over ranks."""
    model = drawn(VisionLanguageModel(config))
    anyres = ANYRES if isinstance(data.layout.image_tokens, Anyres) else None
    processor = processor_of(config.vision, aspect_ratio="anyres" if anyres else "pad", anyres=anyres)
    packs = []
    for rank in range(ranks):
        loader = StepLoader(
            data, StepSampler(6, 6, 0), TileReader(processor), tokens_per_batch=tokens, reduction="token",
            micro_batch=6, few_shapes=few_shapes, form=form_of(config), rank=rank, ranks=ranks,
        )  # fmt: skip
        packs += loader.packs(0)
        assert ranks == 1 or packs[-1].tiles is not None
    loss = torch.stack([model(pack) for pack in packs]).sum()
    learns = list(model.trainable().values())
    return len(packs), loss.detach(), list(torch.autograd.grad(loss, learns))


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    whole, parts = (torch.cat([gradient.flatten() for gradient in these]) for these in (expected, found))
    return float((parts - whole).norm() / whole.norm())


@pytest.mark.parametrize(("config", "tokens"), [(PHI, 4), (LLAMA, ANYRES)], ids=["one tile", "anyres"])
def test_packing_and_filling_change_nothing(
    tmp_path: Path, tokenizer: Tokenizer, config: VLMConfig, tokens: int | Anyres
) -> None:
    data = Pictures(tmp_path, Layout(tokenizer, 256, tokens, modality=False))
    one, loss, gradients = step(config, data, 8192, few_shapes=False)
    assert one == 1 and all(gradient.abs().sum() > 0 for gradient in gradients)
    for budget, few_shapes in ((8192, True), (128, False), (128, True)):
        packs, again, others = step(config, data, budget, few_shapes=few_shapes)
        assert (packs == 1) == (budget == 8192)
        assert torch.allclose(again, loss, rtol=1e-5)
        assert difference(gradients, others) < 1e-5


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize(("config", "tokens"), [(PHI, 4), (LLAMA, ANYRES)], ids=["one tile", "anyres"])
def test_a_step_of_six_ranks_is_the_step_of_one(
    tmp_path: Path, tokenizer: Tokenizer, config: VLMConfig, tokens: int | Anyres, few_shapes: bool
) -> None:
    """Two of them have a text each, and look at a tile of zeros."""
    data = Pictures(tmp_path, Layout(tokenizer, 256, tokens, modality=False))
    _, loss, gradients = step(config, data, 8192, few_shapes=False)
    packs, again, others = step(config, data, 128, few_shapes=few_shapes, ranks=6)
    assert packs == 6 and torch.allclose(again, loss, rtol=1e-5) and difference(gradients, others) < 1e-5
