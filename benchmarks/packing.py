"""Packing of ScienceQA-shaped samples: how full packs are, and that a packed loss is the unpacked one (G19).

Lengths are drawn at random for many steps of 32 samples, half of them with an image; the engine's planner packs them.
`efficiency` is the share of all computed tokens that belong to a sample; `ms` what a loader's thread takes to plan and
lay out a step. `error` is the relative difference of a step's loss from that of the same samples one at a time, in two
layers of the model with its tower's first blocks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch

from benchmarks import command, lengths
from benchmarks.problem import Case, Yardstick
from benchmarks.rows import Origin, Row
from benchmarks.session import new_row
from benchmarks.step import DTYPE, MODELS, TOWER, build
from benchmarks.trainers import packs_of
from benchmarks.whole_steps import timing
from benchmarks.workload import Workload, of_lengths
from engine.data.packing import collate, filled_tokens, token_weights
from models.vlm import VisionLanguageModel

SAMPLES = 32
STEPS, QUICK_STEPS = 200, 50
COMPARED = 3  # steps whose losses are compared
LAYERS = 2


def cases() -> list[Case]:
    return [Case("packing", {"model": "7B", "T": tokens}, modes=("step",)) for tokens in (2048, 4096, 8192)]


def rows(case: Case, device: torch.device, origin: Origin, quick: bool) -> Iterator[Row]:
    """One row: ours."""
    tokens, dtype = case.shape["T"], DTYPE if device.type == "cuda" else torch.float32
    config = MODELS[case.shape["model"]]
    drawn = step_lengths(QUICK_STEPS if quick else STEPS)
    works = [of_lengths(sizes, config.vocab_size, TOWER.image_size, seed) for seed, sizes in enumerate(drawn)]
    seconds, real, computed = [], 0, 0
    for work in works:
        start = time.perf_counter()
        packs = packs_of(work, tokens, "token")
        seconds.append(time.perf_counter() - start)
        real += sum(filled_tokens(pack) for pack in packs)
        computed += sum(pack.input_ids.numel() for pack in packs)
    vlm = build(config, LAYERS, device, dtype=dtype)
    error = max(loss_difference(vlm, work, tokens, device) for work in works[:COMPARED])
    yield new_row(case, "nibble", str(dtype).removeprefix("torch."), origin, None)(
        "step", **timing(seconds), efficiency=real / computed, error=error
    )


def step_lengths(steps: int) -> list[list[int]]:
    """Tokens of each step's samples, without their modality tokens."""
    drawn = [length - 1 for length in lengths.sample_lengths(steps * SAMPLES, seed=1)]
    return [drawn[i : i + SAMPLES] for i in range(0, len(drawn), SAMPLES)]


def loss_difference(vlm: VisionLanguageModel, work: Workload, tokens: int, device: torch.device) -> float:
    """|packed - unpacked| / unpacked, of the loss of one step."""
    weights = token_weights(work.samples, "token")
    parts = zip(work.samples, weights, work.tiles, strict=True)
    alone = [collate([sample], [weight], [tile]) for sample, weight, tile in parts]
    with torch.no_grad():
        packed, unpacked = (
            sum(vlm(pack.to(device)).double().item() for pack in packs)
            for packs in (packs_of(work, tokens, "token"), alone)
        )
    return abs(packed - unpacked) / unpacked


YARDSTICK = Yardstick("packing", __doc__ or "", cases, lambda case: ("nibble",), rows, tiny={"model": "toy"})

if __name__ == "__main__":
    sys.exit(command.main(YARDSTICK, sys.argv[1:]))
