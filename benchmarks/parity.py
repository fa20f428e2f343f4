"""Loss curves: the engine, packed, beside plain PyTorch and bitsandbytes, padded, from the same start (G20).

Both train the same NF4 weights with the same adapters on the same samples in the same order of steps; the plain run is
LaVIN-lite's model (lavin_lite.py) in bf16. It runs several times with other seeds of dropout and of the order in which
a step's samples are summed up: how far these curves are apart is the noise of a run. PEFT's LoRA trains other
parameters, so its curve could not be the same.

    nibble   `error`: distance of the engine's curve from the mean of the plain ones, of the mean loss
    noise    `error`: standard deviation between the plain ones, of the mean loss

Both are root mean squares over the steps. A run like the others has a ratio of about 1.1; 2 is the limit. Without
dropout only rounding and the order of sums are left, and the distance itself is limited.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import command
from benchmarks.end_to_end import SHAPES
from benchmarks.lavin_lite import LavinTrainer
from benchmarks.problem import Case, Yardstick
from benchmarks.rows import Origin, Row
from benchmarks.session import new_row
from benchmarks.step import DTYPE, build
from benchmarks.trainers import NibbleTrainer, Trainer
from benchmarks.whole_steps import release, timing, told
from benchmarks.workload import Workload, workload
from models.adapters.mma import AdapterConfig

SAMPLES = 8  # a step
TOWER_BLOCKS = 6
LR = 1e-3  # about LaVIN's
PLAIN_RUNS, QUICK_PLAIN_RUNS = 4, 3


def cases() -> list[Case]:
    return [
        Case("parity", {"model": "7B", "layers": 4, "T": 2048, "steps": 60, "dropout": dropout}, modes=("step",))
        for dropout in (0.1, 0.0)
    ]


def rows(case: Case, device: torch.device, origin: Origin, quick: bool) -> Iterator[Row]:
    """Ours and the noise."""
    shape, dtype = SHAPES[case.shape["model"]], DTYPE if device.type == "cuda" else torch.float32
    tower = replace(shape.tower, num_layers=TOWER_BLOCKS)
    adapter = AdapterConfig(dropout=case.shape["dropout"])
    vlm = build(
        shape.language, case.shape["layers"], device, tower=tower, dtype=dtype, adapter=adapter, ups=0.0
    )  # fmt: skip
    works = [
        workload(SAMPLES, shape.language.vocab_size, tower.image_size, seed=seed, longest=shape.longest)
        for seed in range(case.shape["steps"])
    ]
    curves: list[list[float]] = []
    spent: list[float] = []
    why = ""
    try:
        for seed in range(QUICK_PLAIN_RUNS if quick else PLAIN_RUNS):  # before the engine trains the model they copy
            plain = LavinTrainer(vlm, device, dtype=dtype, lr=LR, padded=shape.longest, polite=True, order=seed)
            torch.manual_seed(seed)  # of dropout
            curve, seconds = train(plain, works)
            curves.append(curve)
            spent += seconds
    except Exception as failure:  # of any kind: it is bitsandbytes' or plain torch's, not ours
        why = told(failure)
    if why:
        yield new_row(case, "noise", str(dtype).removeprefix("torch."), origin, "bitsandbytes")(failure=why)
        return
    ours, seconds = train(NibbleTrainer(vlm, case.shape["T"], device, lr=LR), works)
    for name, times, losses, error, package in (
        ("nibble", seconds, ours, distance(ours, curves), None),
        ("noise", spent, [loss for curve in curves for loss in curve], noise(curves), "bitsandbytes"),
    ):
        row = new_row(case, name, str(dtype).removeprefix("torch."), origin, package)
        yield row("step", **timing(times), loss=statistics.mean(losses), error=error)
    release(device)


def train(trainer: Trainer, works: Sequence[Workload]) -> tuple[list[float], list[float]]:
    """Loss and seconds of each step."""
    losses, seconds = [], []
    for work in works:
        batch = trainer.prepare(work)
        start = time.perf_counter()
        losses.append(trainer.step(batch))
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def distance(curve: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    """Of a curve from the mean of others, root mean square over the steps, of the mean loss."""
    mean = [statistics.mean(losses) for losses in zip(*others, strict=True)]
    return _size(a - b for a, b in zip(curve, mean, strict=True)) / statistics.mean(mean)


def noise(curves: Sequence[Sequence[float]]) -> float:
    """The standard deviation between curves, root mean square over the steps, of the mean loss."""
    spread = (statistics.stdev(losses) for losses in zip(*curves, strict=True))
    return _size(spread) / statistics.mean(loss for curve in curves for loss in curve)


def _size(values: Iterable[float]) -> float:
    return statistics.mean(value**2 for value in values) ** 0.5


YARDSTICK = Yardstick(
    "parity", __doc__ or "", cases, lambda case: ("nibble", "noise"), rows,
    tiny={"model": "toy", "layers": 2, "T": 128, "steps": 4},
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(command.main(YARDSTICK, sys.argv[1:]))
