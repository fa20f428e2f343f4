from __future__ import annotations

import math
from itertools import pairwise

import pytest

from engine.config import Optim
from engine.schedule import CosineSchedule

# LaVIN's ScienceQA recipe: blr 9e-3, 32 samples a step, 12,726 samples, 20 epochs, 2 of warm-up
STEPS = 12726 // 32
LAVIN = CosineSchedule(
    lr=Optim().peak_lr(num_ranks=1), min_lr=0.0, epochs=20, warmup_epochs=2,
    steps_per_epoch=STEPS, step_share=32 / 12726,
)  # fmt: skip


def test_lavin_values():
    assert STEPS == 397
    assert LAVIN(0) == 0.0
    assert LAVIN(1) == pytest.approx(1.125e-3 * 32 / 12726 / 2)
    assert LAVIN(396) == pytest.approx(1.125e-3 * 396 * 32 / 12726 / 2)  # 22 samples of the epoch fill no step
    assert LAVIN(397) == pytest.approx(1.125e-3 / 2)
    assert LAVIN(794) == pytest.approx(1.125e-3)
    assert LAVIN(794 + 9 * 397) == pytest.approx(1.125e-3 / 2)  # half of the 18 epochs of decay
    last = 17 + 396 * 32 / 12726  # epochs of decay before the last step
    assert LAVIN(7939) == pytest.approx(1.125e-3 * (1 + math.cos(math.pi * last / 18)) / 2)
    assert LAVIN(7940) == pytest.approx(0.0, abs=1e-12)


def test_it_rises_then_falls():
    values = [LAVIN(step) for step in range(7941)]
    assert all(a < b for a, b in pairwise(values[:795]))
    assert all(a > b for a, b in pairwise(values[794:]))


def test_it_ends_at_min_lr_and_stays_there():
    schedule = CosineSchedule(lr=1e-3, min_lr=1e-5, epochs=3, warmup_epochs=0.5, steps_per_epoch=10, step_share=0.1)
    assert schedule(30) == pytest.approx(1e-5)
    assert schedule(45) == pytest.approx(1e-5)
    assert schedule(29) > 1e-5


def test_no_warmup_starts_at_the_peak_and_warmup_alone_never_decays():
    assert CosineSchedule(lr=1.0, min_lr=0.0, epochs=2, warmup_epochs=0, steps_per_epoch=10, step_share=0.1)(0) == 1.0
    only_warmup = CosineSchedule(lr=1.0, min_lr=0.0, epochs=2, warmup_epochs=2, steps_per_epoch=10, step_share=0.1)
    assert only_warmup(19) == pytest.approx(0.95)
    assert only_warmup(20) == 0.0
