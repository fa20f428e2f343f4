"""The samples that a plan speaks about: ScienceQA's under LaVIN's template.

The tokenised data are not there when a plan is made. Facts of the data set: 287 tokens a sample, about 200 of them
supervised, an image for 48.7 %, 12,726 samples to train on; the second moment is that of lengths with a median of 270
and a 90th percentile of 515, cut at 512. Packs are 96.6 % full. Where an image is not LaVIN's six tokens but 576 or
729, samples with one are longer by so much.
"""

from __future__ import annotations

from engine.config import Config, dataset_format
from engine.data.planning import own_rows, round_up

LAVIN_TOKENS = 6  # of an image, among the 287
MEAN_LENGTH, SUPERVISED, IMAGE_SHARE, SAMPLES = 287, 200, 0.487, 12_726
PAIRS_PER_TOKEN = 175  # sum of length^2 / 2 over sum of length
FILLED = 0.966


def mean_length(image_tokens: int) -> int:
    """Tokens of a sample, on average, where an image is so many."""
    return round(MEAN_LENGTH + IMAGE_SHARE * (image_tokens - LAVIN_TOKENS))


def pairs_per_token(longest: int, image_tokens: int) -> int:
    """Scores of causal attention a token, in samples of at most `longest` tokens; whether a sample has an image does
    not depend on its length."""
    more = image_tokens - LAVIN_TOKENS
    pairs = PAIRS_PER_TOKEN * MEAN_LENGTH + IMAGE_SHARE * more * (MEAN_LENGTH + more / 2)  # a sample, on average
    return min(round(pairs / (MEAN_LENGTH + IMAGE_SHARE * more)), longest // 2)


def samples_per_pack(tokens: int, image_tokens: int) -> float:
    """On average, in packs of so many tokens."""
    return FILLED * tokens / mean_length(image_tokens)


def typical_pack(samples_per_step: int, most: int, image_tokens: int, *, modality: bool) -> tuple[int, float]:
    """Tokens, and samples, of a pack of steps of so many samples; `most`: tokens of the largest that may be."""
    tokens = samples_per_step * mean_length(image_tokens)
    packs = -(-tokens // most)
    return min(most, round_up(own_rows(modality=modality) + -(-tokens // packs))), samples_per_step / packs


def samples_of(config: Config) -> int | None:
    """Samples of an epoch, where they are ScienceQA's; else None: that takes reading the data."""
    is_scienceqa = dataset_format(config) == "scienceqa" and bool(config.dataset.root)
    return SAMPLES if is_scienceqa and config.dataset.split == "train" else None
