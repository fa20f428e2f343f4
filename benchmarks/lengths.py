"""Lengths of samples as ScienceQA has them under LaVIN's template, clipped at 512 tokens as LaVIN clips them.

Of 732 original items the median is about 270 tokens, the 90th percentile about 515, and 11 % are longer than 512. A
log-normal distribution with that median and percentile has 10 % there, and a mean of 291 after clipping (ScienceQA's
is 286). The draw is seeded: every run sees the same lengths.
"""

from __future__ import annotations

import math
import statistics

import numpy as np

LONGEST = 512
SHORTEST = 40  # LaVIN's shortest prompt has 35 tokens, its shortest answer four
MEDIAN, P90 = 270.0, 515.0
SIGMA = math.log(P90 / MEDIAN) / 1.2816  # the normal distribution's 90th percentile


def sample_lengths(count: int, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN), SIGMA, count)
    return [int(length) for length in np.clip(drawn, SHORTEST, LONGEST)]


def stratified(count: int, seed: int = 0) -> list[int]:
    """One length from each of `count` equal parts of the distribution, shuffled: any step has its mean and its tail.
    A sample's modality token, which ScienceQA's figures count, is not in it."""
    normal = statistics.NormalDist(math.log(MEDIAN), SIGMA)
    drawn = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = [int(length) - 1 for length in np.clip(drawn, SHORTEST, LONGEST)]
    return [lengths[i] for i in np.random.default_rng(seed).permutation(count)]


def pack(tokens: int) -> list[int]:
    """Lengths that fill `tokens` exactly: the last sample is cut."""
    lengths, left = [], tokens
    for length in sample_lengths(tokens // SHORTEST + 1):
        lengths.append(min(length, left))
        left -= lengths[-1]
        if not left:
            break
    return lengths


def bounds(lengths: list[int]) -> list[int]:
    """Where each sample begins, and the end: cu_seqlens."""
    return [0, *np.cumsum(lengths).tolist()]


def positions(lengths: list[int]) -> list[int]:
    return [position for length in lengths for position in range(length)]
