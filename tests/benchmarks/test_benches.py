"""Every benchmark builds, is checked and makes rows on a CPU, at tiny sizes: signatures of kernels and peers hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import lanes, lengths, peers, suite
from benchmarks import measure as clock
from benchmarks.lanes import Lane, Program, Wrong
from benchmarks.measure import Timing, restorer
from benchmarks.problem import Bench, Case, Inputs, Mode, Problem, Variant, normal, passes
from benchmarks.rows import MODES, Row, parse
from benchmarks.session import measure
from kernels import library, unpacked
from tests.benchmarks.made_up_rows import ORIGIN

CPU = torch.device("cpu")
GPU_ONLY = {"compile", "varlen", "nibble_triton"}  # the interpreter has no bf16 products


class Stopped:
    """A clock for where there is no GPU: calls what would be timed and gives made-up times."""

    def interleaved(self, of: Sequence[Lane], mode: Mode, restore: Callable[[], object]) -> dict[str, Timing | str]:
        for lane in of:
            restore()
            program = Program(lane, mode, lane.drawn)
            program.before()
            program.timed()
            assert program.kept(), lane.variant.name
        timing = Timing(1.0, 0.9, 1.1, 9, "stream", False, 0, 0, None, None, 1.0)
        return {lane.variant.name: timing for lane in of}


def tiny(bench: Bench) -> list[Case]:
    """The cases with the sizes that a CPU can do, each once."""
    found = {}
    for case in bench.cases():
        small = replace(case, shape={**case.shape, **bench.tiny})
        found[small.name] = small
    return list(found.values())


def on_a_cpu(bench: Bench) -> Bench:
    """Without the variants that need a GPU or a package."""

    def problem(case: Case, device: torch.device) -> Problem:
        whole = bench.problem(case, device)
        kept = tuple(v for v in whole.variants if v.package is None and v.name not in GPU_ONLY)
        return replace(whole, variants=kept)

    return replace(bench, problem=problem)


@pytest.mark.parametrize("name", (*suite.BENCHES, *suite.YARDSTICKS))
def test_cases_are_well_named(name: str) -> None:
    bench = suite.part(name)
    names = [case.name for case in bench.cases()]
    assert len(names) == len(set(names)) > 0
    assert bench.name == name and {case.bench for case in bench.cases()} == {name}
    assert all(set(case.modes) <= set(MODES) and case.modes for case in bench.cases())
    assert all(set(bench.tiny) <= set(case.shape) for case in bench.cases())


@pytest.mark.parametrize("name", suite.BENCHES)
def test_ours_and_torchs_are_right_and_make_rows(name: str) -> None:
    bench = on_a_cpu(suite.bench(name))
    for case in tiny(bench):
        rows = list(measure(bench, case, CPU, Stopped(), ORIGIN))
        assert [f"{row.variant} at {row.name}: {row.failure}" for row in rows if row.failure] == []
        variants = [variant.name for variant in bench.problem(case, CPU).variants]
        assert variants[0] == "nibble"
        for mode in case.modes:
            copy = ["copy"] if any(row.bytes for row in rows if row.mode == mode) else []
            assert [row.variant for row in rows if row.mode == mode] == [*variants, *copy]
        for row in rows:
            assert parse(row.flat()) == row
            assert (row.bytes is None) != (row.flops is None) and row.fraction
            assert row.error is not None or row.variant in ("copy", "gemms")


FOLDER = Path(suite.__file__).parent
COMPILED = [name for name in suite.BENCHES if "compiled(" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", COMPILED)
def test_what_torch_compiles_is_one_graph_and_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that shows without a GPU: traced and differentiated, then run without generated code."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "compiled", partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager"))
    found = 0
    for case in tiny(module.BENCH):
        torch.compiler.reset()
        problem = module.BENCH.problem(case, CPU)
        (drawn,) = lanes.draw(problem, 1, CPU)
        expected = lanes.expect(problem, drawn)
        for variant in (variant for variant in problem.variants if variant.name == "compile"):
            lanes.check(problem, variant, variant.build(), drawn, expected)
            found += 1
    assert found


def bench_of(*variants: Variant, tolerance: float | None = None) -> Bench:
    def problem(case: Case, device: torch.device) -> Problem:
        return Problem(
            draw=lambda generator: {"x": normal(generator, 4, 8)}, differentiable=("x",), reference=double,
            variants=variants, cost=passes(2, 2, 4, 8), tolerance=tolerance,
        )  # fmt: skip

    return Bench("made_up", "", lambda: [Case("made_up", {"T": 4})], problem, tiny={})


def double(inputs: Inputs) -> tuple[Tensor, ...]:
    return (2 * inputs["x"],)


def rows_of(*variants: Variant) -> list[Row]:
    bench = bench_of(*variants)
    return list(measure(bench, bench.cases()[0], CPU, Stopped(), ORIGIN))


def missing() -> Any:
    raise ModuleNotFoundError("No module named 'liger_kernel'")


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        (Variant("nibble", lambda: lambda inputs: (2.1 * inputs["x"],)), "Wrong: relative error"),
        (Variant("nibble", lambda: lambda inputs: (inputs["x"] / 0,)), "Wrong: relative error inf"),
        (Variant("nibble", lambda: lambda inputs: (2 * inputs["x"].detach() + 0 * inputs["x"],)), "Wrong"),
        (Variant("nibble", lambda: lambda inputs: (2 * inputs["x"][:1],)), "RuntimeError"),
        (Variant("liger", missing, package="liger-kernel"), "No module named 'liger_kernel'"),
    ],
)
def test_what_is_wrong_or_missing_gets_its_reason_and_no_time(variant: Variant, said: str) -> None:
    rows = rows_of(variant, Variant("torch", lambda: double))
    assert rows[0].failure is not None and said in rows[0].failure and rows[0].mode is None
    assert {row.variant for row in rows[1:]} == {"torch", "copy"}


def test_a_variant_cannot_spoil_the_others_inputs() -> None:
    def overwrite(inputs: Inputs) -> tuple[Tensor, ...]:
        return (lanes.activation(inputs["x"]).mul_(2),)

    rows = rows_of(Variant("nibble", lambda: overwrite), Variant("torch", lambda: double))
    assert [f"{row.variant} at {row.name}: {row.failure}" for row in rows if row.failure] == []
    assert len({row.variant for row in rows}) == 3


def test_a_clock_that_fails_costs_one_mode_and_names_the_reason() -> None:
    class Fails(Stopped):
        def interleaved(self, of: Sequence[Lane], mode: Mode, restore: Callable[[], object]) -> dict[str, Timing | str]:
            if mode == "forward":
                raise RuntimeError("out of memory")
            return super().interleaved(of, mode, restore)

    bench = bench_of(Variant("nibble", lambda: double))
    rows = list(measure(bench, bench.cases()[0], CPU, Fails(), ORIGIN))
    assert {(row.variant, row.failure) for row in rows if row.mode == "forward"} == {
        (name, "RuntimeError: out of memory") for name in ("nibble", "copy")
    }
    assert all(row.ms for row in rows if row.mode != "forward") and len(rows) == 6


def test_restoring_gives_every_tensor_its_first_value() -> None:
    frozen = torch.ones(3)
    sets = [lanes.Drawn({"x": torch.full((2,), float(i)), "w": frozen}, (), ()) for i in range(2)]
    own = [lanes.Drawn({"padded": torch.zeros(4)}, (), ())]
    restore = restorer(sets, own)
    for drawn in (*sets, *own):
        for x in drawn.tensors():
            x.add_(5)
    restore()
    assert [drawn.inputs["x"].tolist() for drawn in sets] == [[0.0, 0.0], [1.0, 1.0]]
    assert own[0].inputs["padded"].tolist() == [0.0] * 4
    assert frozen.tolist() == [11.0] * 3  # shared: a weight, which nobody changes


def test_sets_outgrow_the_cache_and_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mb, gb = 10**6, 10**9
    monkeypatch.setattr(clock, "_l2_bytes", lambda: 50 * mb)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * gb, 24 * gb))
    assert clock.count_sets(25 * mb, 0, 1e-3, 3) == 6
    assert clock.count_sets(9 * mb, 9 * mb, 2e-6, 3) == clock.MAX_SETS
    assert clock.count_sets(25 * mb, 25 * mb, 1e-4, 3) == 6
    # all of a model's weights, with a token as input: a call sweeps the cache, and each set's copy is as large
    assert clock.count_sets(16, 4 * gb, 1e-3, 1) == 1
    assert clock.count_sets(16, 4 * gb, 1e-6, 1) == 2


def test_a_layer_does_not_find_what_its_own_backward_unpacked() -> None:
    problem = suite.bench("step").problem(tiny(suite.bench("step"))[0], CPU)
    (drawn,) = lanes.draw(problem, 1, CPU)
    lane = Lane(problem.variants[0], problem.variants[0].build(), [drawn], None)
    spent = []
    for _ in range(2):
        before = unpacked.counters.dequantisations
        Program(lane, "full", [drawn]).timed()
        spent.append(unpacked.counters.dequantisations - before)
    assert spent[0] == spent[1] > 0


def test_no_peers_kernel_is_timed_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where csrc was built for other cards, too."""
    empty = torch.empty(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty)
    monkeypatch.setattr(library, "missing", lambda: "")
    monkeypatch.setattr(library, "available_for", lambda _: "this GPU is sm_75")
    with pytest.raises(RuntimeError, match="csrc: this GPU is sm_75"):
        peers.require_csrc(double)


def test_the_error_is_relative_and_never_nan() -> None:
    x = torch.tensor([3.0, 4.0])
    assert lanes.relative_error(x * 1.01, x) == pytest.approx(0.01, rel=1e-4)
    assert lanes.relative_error(x * float("nan"), x) == float("inf")
    with pytest.raises(Wrong, match="shapes"):
        problem = bench_of().problem(Case("made_up", {"T": 4}), CPU)
        (drawn,) = lanes.draw(problem, 1, CPU)
        lanes.check(problem, Variant("nibble", lambda: double), double, drawn, [])


def test_lengths_are_scienceqas() -> None:
    drawn = lengths.sample_lengths(20_000)
    assert sum(drawn) / len(drawn) == pytest.approx(286, rel=0.03)
    assert sum(length == 512 for length in drawn) / len(drawn) == pytest.approx(0.11, abs=0.015)
    assert (min(drawn), max(drawn)) == (40, 512)
    for tokens in (512, 2048, 8192):
        assert sum(lengths.pack(tokens)) == tokens and lengths.pack(tokens) == lengths.pack(tokens)
    assert lengths.bounds([3, 2]) == [0, 3, 5] and lengths.positions([3, 2]) == [0, 1, 2, 0, 1]
