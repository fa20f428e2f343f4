"""The clock, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import suite
from benchmarks.measure import Clock, Effort, ceilings
from benchmarks.problem import Inputs, Variant
from benchmarks.session import describe, measure
from tests.benchmarks.test_benches import bench_of, double

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times need a CUDA GPU")
SHORT = Effort(rounds=5, fewest=5, seconds=0.1)


def test_ceilings_are_those_of_a_gpu() -> None:
    found = ceilings()
    assert 50 < found.copy_gbps < 20_000 and 5 < found.matrix_tflops < 10_000


def rows_of(*variants: Variant):  # type: ignore[no-untyped-def]
    bench = bench_of(*variants)
    origin = describe(ceilings(), "test", "run")
    return list(measure(bench, bench.cases()[0], torch.device("cuda"), Clock(SHORT), origin))


def test_a_variant_that_waits_is_found_and_all_are_called_alike() -> None:
    def waiting(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        inputs["x"].sum().item()
        return double(inputs)

    alone = rows_of(Variant("nibble", lambda: double))
    assert {(row.timing, row.waits) for row in alone} == {("graph", False)}
    both = rows_of(Variant("nibble", lambda: double), Variant("waiting", lambda: waiting))
    assert {row.timing for row in both} == {"stream"}
    waits = {row.variant for row in both if row.waits}
    assert waits == {"waiting"}


def test_memory_and_launches_are_counted() -> None:
    forward = next(row for row in rows_of(Variant("nibble", lambda: double)) if row.mode == "forward")
    assert (forward.peak_bytes, forward.extra_bytes, forward.saved_bytes) == (4 * 8 * 2, 0, 0)
    assert forward.launches in (1, None)
    assert forward.host_us and forward.host_us > 0


@pytest.mark.parametrize("name", suite.BENCHES)
def test_every_benchmark_is_timed(name: str) -> None:
    bench = suite.bench(name)
    case = next(case for case in bench.cases() if case.quick)
    tiny = replace(case, shape={**case.shape, **bench.tiny})
    origin = describe(ceilings(), "test", "run")
    rows = list(measure(bench, tiny, torch.device("cuda"), Clock(SHORT), origin, quick=True))
    assert [row.failure for row in rows if row.variant == "nibble" and row.failure] == []
    assert {row.mode for row in rows if row.ms} == set(tiny.modes)
