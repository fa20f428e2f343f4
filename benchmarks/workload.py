"""An optimiser step's samples, shaped as ScienceQA's under LaVIN's template: what every trainer is given.

Of 32 samples the mean is 289.5 tokens, 290.5 with a sample's modality token, and 9.4 % are at the limit of 512, which
counts that one (lengths.py). Every other sample has an image; the prompt, 30 % of the tokens, is no target, which
leaves 202.6 supervised ones a sample. Token ids are random, frequent ones first (Zipf's law), so that there is
something to learn about them; pixels are random too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import lengths
from benchmarks.step import PROMPT_SHARE
from engine.data.sample import IGNORE, Sample
from models.vision.config import NUM_TAPS

FIRST_SLOT = 4  # of an image's tokens, behind BOS and "Image: "
HEAD = FIRST_SLOT + NUM_TAPS  # an image sample's first tokens, never targets
FIRST_WORD = 3  # of the vocabulary, behind <unk>, BOS and EOS
BOS = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """Samples and, for those with an image, its tile: fp32 [3, H, W] on the CPU."""

    samples: list[Sample]
    tiles: list[Tensor | None]

    @property
    def tokens(self) -> int:
        """Real ones: no padding, no modality tokens."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def supervised(self) -> int:
        return sum(len(sample.supervised) for sample in self.samples)

    @property
    def images(self) -> int:
        return sum(tile is not None for tile in self.tiles)


def workload(
    count: int, vocabulary: int, image_size: int, *, seed: int = 0, longest: int = lengths.LONGEST
) -> Workload:
    """The samples of a step. `longest`: where it is not 512, all lengths are scaled to it (tests)."""
    scaled = [max(HEAD + 2, length * longest // lengths.LONGEST) for length in lengths.stratified(count, seed)]
    return of_lengths(scaled, vocabulary, image_size, seed)


def of_lengths(sizes: Sequence[int], vocabulary: int, image_size: int, seed: int = 0) -> Workload:
    """Samples of these lengths, every other one with an image where the image's tokens fit."""
    generator = torch.Generator().manual_seed(seed)
    words = np.random.default_rng(seed)
    frequency = 1.0 / np.arange(1, vocabulary - FIRST_WORD + 1)
    frequency /= frequency.sum()
    samples: list[Sample] = []
    tiles: list[Tensor | None] = []
    for i, length in enumerate(sizes):
        has_image = i % 2 == 0 and length > HEAD
        slots = list(range(FIRST_SLOT, HEAD)) if has_image else []
        ids = [BOS, *(FIRST_WORD + words.choice(len(frequency), length - 1, p=frequency)).tolist()]
        for slot in slots:
            ids[slot] = 0
        prompt = max(HEAD if has_image else 1, round(PROMPT_SHARE * length))
        image = f"{i}.png" if has_image else None
        samples.append(Sample(str(i), ids, [IGNORE] * prompt + ids[prompt:], image, slots, False))
        tiles.append(torch.randn(3, image_size, image_size, generator=generator) if has_image else None)
    return Workload(samples, tiles)
