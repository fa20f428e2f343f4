"""--tiny: every case of a benchmark at sizes that a CPU can do, to see whether it runs. No figures, no rows.

The code that measures is the one that runs, but for the clock of kernels, which needs a GPU: here each variant is
called once in each mode. Whole steps run in full, with every trainer that is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.lanes import Lane, Program
from benchmarks.measure import Timing, reason
from benchmarks.problem import Bench, Case, Mode, Yardstick
from benchmarks.rows import Origin, Row

# Rows say where they come from; these are printed and dropped, and shares of such ceilings mean nothing.
NOWHERE = Origin(
    run="tiny", date="-", commit="-", dirty=False, gpu="-", driver="-", torch=torch.__version__, triton="-", python="-",
    copy_gbps=1.0, matrix_tflops=1.0,
)  # fmt: skip


class Once:
    """Stands for benchmarks.measure.Clock: one call of each variant, by the host's clock."""

    def interleaved(self, lanes: Sequence[Lane], mode: Mode, restore: Callable[[], object]) -> dict[str, Timing | str]:
        """By variant: how long the call took, or why it failed."""
        found: dict[str, Timing | str] = {}
        for lane in lanes:
            try:
                restore()
                program = Program(lane, mode, lane.drawn[:1])
                program.before()
                start = time.perf_counter()
                program.timed()
                found[lane.variant.name] = _timing(1e3 * (time.perf_counter() - start))
            except Exception as error:  # of any kind: a peer's, or ours
                found[lane.variant.name] = reason(error)
        return found


def _timing(ms: float) -> Timing:
    return Timing(ms, ms, ms, 1, "stream", False, 0, 0, None, None, 1e3 * ms)


def cases(bench: Bench | Yardstick, full: Sequence[Case]) -> list[Case]:
    """The cases at tiny sizes; those that become the same are there once."""
    small = (replace(case, shape={**case.shape, **bench.tiny}) for case in full)
    return list({case.name: case for case in small}.values())


def must_run(variant: str, on: torch.device) -> bool:
    """Whether its failure is ours: on a CPU only the engine itself, as its other ways (nibble_*) are for GPUs."""
    return variant == "nibble" or (variant.startswith("nibble") and on.type == "cuda")


def in_words(row: Row) -> str:
    """One line for the terminal."""
    who = f"{row.name}: {row.variant}"
    if row.failure is not None:
        return f"{who} did not run{f' {row.mode}' if row.mode else ''}: {row.failure}"
    said = [f"ran {row.mode}", f"{row.ms:.3g} ms"]
    said += [f"loss {row.loss:.4f}"] if row.loss is not None else []
    said += [f"error {row.error:.1e}"] if row.error is not None else []
    return f"{who} {', '.join(said)}"
