"""Validation and scoring see no more pictures at a time than a training pack has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.build import layout_of
from engine.config import Config
from engine.data.planning import most_tiles
from engine.data.sample import Sample
from engine.data.scienceqa import ScienceQA
from engine.data.tokenizer import open_tokenizer
from engine.demo.cache import demo_base, demo_data
from engine.distributed import Ranks
from engine.evaluation.letters import predict
from engine.evaluation.validation import validation_loss
from models.language.llama import LlamaConfig
from models.pack import Pack
from models.vision.clip import ClipConfig
from models.vlm import VLMConfig

CPU, TOKENS, COUNT = torch.device("cpu"), 512, 24
LAVIN = VLMConfig(language=LlamaConfig(), vision=ClipConfig())


class Seen(nn.Module):
    """Stands for the model: remembers how many tiles its packs have."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.config = LAVIN
        self.tiles: list[int] = []

    def hidden(self, pack: Pack) -> Tensor:
        self.tiles.append(0 if pack.tiles is None else len(pack.tiles))
        return torch.zeros(pack.input_ids.numel(), 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), self.vocabulary)

    def forward(self, pack: Pack) -> Tensor:
        self.hidden(pack)
        return torch.zeros(())


@dataclass
class Pictures:
    """Short samples that all have a picture."""

    image: str = "a picture"
    read: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return COUNT

    def sample(self, index: int) -> Sample:
        ids = [1] * 20
        return Sample(str(index), ids, [-100] * 10 + ids[10:], self.image, list(range(6)), truncated=False)

    def where(self, index: int) -> str:
        return str(index)

    def tile(self, path: str, where: str = "") -> Tensor:
        self.read.append(path)
        return torch.zeros(3, 4, 4)


def test_validation() -> None:
    model, rows = Seen(8), Pictures()
    ranks = Ranks(rank=0, local_rank=0, world=1)
    validation_loss(cast(Any, model), rows, cast(Any, rows), ranks, tokens_per_batch=TOKENS, device=CPU)
    assert sum(model.tiles) == COUNT and max(model.tiles) == most_tiles(TOKENS) == 2


def test_scoring() -> None:
    tokenizer = open_tokenizer(demo_base() / "tokenizer.model")
    problems = ScienceQA(demo_data(), "test", layout_of(Config(), tokenizer, LAVIN))
    shown = [i for i, problem in enumerate(problems.problems) if problem["image"]][:COUNT]
    model = Seen(tokenizer.vocab_size)
    predict(cast(Any, model), problems, Pictures().tile, tokens_per_batch=TOKENS, device=CPU, indices=shown)
    assert sum(model.tiles) == len(shown) == COUNT and max(model.tiles) == 2
