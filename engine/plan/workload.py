"""The samples that a plan speaks about: ScienceQA's under LaVIN's template.

The tokenised data are not there when a plan is made. Facts of the data set: 287 tokens a sample, about 200 of them
supervised, an image for 48.7 %, 12,726 samples to train on; the second moment is that of lengths with a median of 270
and a 90th percentile of 515, cut at 512. Packs are 96.6 % full.
"""

from __future__ import annotations

from engine.build import dataset_format
from engine.config import Config

MEAN_LENGTH, SUPERVISED, IMAGE_SHARE, SAMPLES = 287, 200, 0.487, 12_726
PAIRS_PER_TOKEN = 175  # sum of length^2 / 2 over sum of length
FILLED = 0.966


def samples_per_pack(tokens: int) -> float:
    """On average, in packs of so many tokens."""
    return FILLED * tokens / MEAN_LENGTH


def samples_of(config: Config) -> int | None:
    """Samples of an epoch, where they are ScienceQA's; else None: that takes reading the data."""
    is_scienceqa = dataset_format(config) == "scienceqa" and bool(config.dataset.root)
    return SAMPLES if is_scienceqa and config.dataset.split == "train" else None
