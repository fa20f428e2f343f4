"""The samples that a plan speaks about: ScienceQA's under LaVIN's template.

The tokenised data are not there when a plan is made. Facts of the data set: 287 tokens a sample, about 200 of them
supervised, an image for 48.7 %, 12,726 samples to train on; the second moment is that of lengths with a median of 270
and a 90th percentile of 515, cut at 512. Packs are 96.6 % full.
"""

from __future__ import annotations

from engine.config import Config, dataset_format
from engine.data.planning import MODALITY_ROWS, round_up

MEAN_LENGTH, SUPERVISED, IMAGE_SHARE, SAMPLES = 287, 200, 0.487, 12_726
PAIRS_PER_TOKEN = 175  # sum of length^2 / 2 over sum of length
FILLED = 0.966


def pairs_per_token(longest: int) -> int:
    """Scores of causal attention a token, in samples of at most `longest` tokens."""
    return min(PAIRS_PER_TOKEN, longest // 2)


def samples_per_pack(tokens: int) -> float:
    """On average, in packs of so many tokens."""
    return FILLED * tokens / MEAN_LENGTH


def typical_pack(samples_per_step: int, most: int) -> tuple[int, float]:
    """Tokens, and samples, of a pack of steps of so many samples; `most`: tokens of the largest that may be."""
    tokens = samples_per_step * MEAN_LENGTH
    packs = -(-tokens // most)
    return min(most, round_up(MODALITY_ROWS + -(-tokens // packs))), samples_per_step / packs


def samples_of(config: Config) -> int | None:
    """Samples of an epoch, where they are ScienceQA's; else None: that takes reading the data."""
    is_scienceqa = dataset_format(config) == "scienceqa" and bool(config.dataset.root)
    return SAMPLES if is_scienceqa and config.dataset.split == "train" else None
