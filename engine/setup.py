"""What every part of a training run needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import Config
from engine.data.images import TileReader
from engine.data.scienceqa import ScienceQA
from engine.distributed import Ranks
from engine.evaluation.letters import predict
from engine.evaluation.score import score_table
from engine.progress import Progress
from engine.rundir import RunDir
from engine.sources import Sources
from engine.ticker import Ticker
from models.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Setup:
    """The configuration and what was built from it."""

    config: Config
    sources: Sources
    model: VisionLanguageModel
    reader: TileReader
    ranks: Ranks
    device: torch.device
    rundir: RunDir
    benchmark: ScienceQA | None  # the evaluation split, where --log.evaluate asks for it

    def accuracy(self, progress: Progress) -> dict[str, float]:
        """The score table of the benchmark, computed on every rank alike; empty without one."""
        dataset = self.benchmark
        if dataset is None:
            return {}
        progress.note(f"scoring {len(dataset):,} problems of the {self.config.dataset.eval_split} split")
        guesses = predict(
            self.model, dataset, self.reader.tile,
            tokens_per_batch=self.config.runtime.tokens_per_batch, device=self.device,
            on_done=Ticker(len(dataset), "problems scored", enabled=self.ranks.is_main),
        )  # fmt: skip
        return score_table(dataset.problems, guesses)
