"""The choice of a backend and the launch table."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import BackendError, as_on_card, choose, decisions, launch, record, set_backend, unit_stride
from kernels.launches import LAUNCHES, Choice, Launch

BOTH = ("triton", "reference")
CUDA = ("cuda", "reference")
ON_GPU: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which nothing has been chosen and no variable is set."""
    monkeypatch.setattr(dispatch, "_settings", {})
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.delenv("NIBBLE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("NIBBLE_EMULATE", raising=False)


def test_auto_takes_the_reference_on_the_cpu() -> None:
    assert choose("op", torch.zeros(1), BOTH) == "reference"


def test_auto_takes_triton_on_the_cpu_when_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("op", torch.zeros(1), BOTH) == "triton"
    assert choose("op", torch.zeros(1, dtype=torch.float64), BOTH) == "reference"
    assert choose("plain", torch.zeros(1), ("reference",)) == "reference"


def test_auto_takes_csrc_on_the_cpu_when_emulated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NIBBLE_EMULATE", "1")
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        assert choose("op", torch.zeros(1), CUDA) == "cuda"
    assert [entry.getMessage() for entry in caplog.records] == ["op: cuda (NIBBLE_EMULATE=1)"]
    assert choose("op", torch.zeros(1, dtype=torch.float64), CUDA) == "reference"
    assert choose("other", torch.zeros(1), BOTH) == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_takes_triton_on_a_gpu() -> None:
    assert choose("op", torch.zeros(1, device="cuda"), BOTH) == "triton"
    assert choose("plain", torch.zeros(1, device="cuda"), ("reference",)) == "reference"


def test_the_environment_sets_the_default_and_set_backend_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("NIBBLE_KERNELS", "reference")
    assert choose("op", torch.zeros(1), BOTH) == "reference"
    assert set_backend("triton") == "reference"
    assert choose("op", torch.zeros(1), BOTH) == "triton"
    assert set_backend("auto") == "triton"


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'tritn'.*auto, triton, cuda, reference"):
        set_backend("tritn")
    monkeypatch.setenv("NIBBLE_KERNELS", "fast")
    with pytest.raises(ValueError, match="NIBBLE_KERNELS got 'fast'"):
        choose("op", torch.zeros(1), BOTH)


@pytest.mark.parametrize(
    ("wanted", "x", "available", "why"),
    [
        ("triton", torch.zeros(1), BOTH, "torch.float32 tensor on cpu"),  # not interpreted
        ("triton", torch.zeros(1, dtype=torch.float64), BOTH, "torch.float64 tensor on cpu"),
        ("cuda", torch.zeros(1), CUDA, "torch.float32 tensor on cpu"),
    ],
)
def test_an_explicit_choice_never_falls_back(
    wanted: str, x: torch.Tensor, available: tuple[str, ...], why: str
) -> None:
    set_backend(wanted)
    with pytest.raises(BackendError, match=rf"op: backend '{wanted}' .*\({why}\); accepted here: auto, reference"):
        choose("op", x, available)
    assert decisions() == {}


def test_a_backend_whose_library_is_missing_does_not_run() -> None:
    missing = {"cuda": "its library is missing"}
    assert choose("op", ON_GPU, CUDA) == "cuda"
    assert choose("op", ON_GPU, CUDA, missing) == "reference"
    set_backend("cuda")
    with pytest.raises(BackendError, match="its library is missing"):
        choose("op", ON_GPU, CUDA, missing)


def test_the_reference_is_no_choice_on_a_gpu_where_something_must_be_installed() -> None:
    missing = {"cuda": "its library is missing"}
    with pytest.raises(BackendError, match="op: its library is missing; make it"):
        choose("op", ON_GPU, CUDA, missing, install="make it")
    assert choose("op", torch.zeros(1), CUDA, missing, install="make it") == "reference"
    assert choose("op", ON_GPU, CUDA, install="make it") == "cuda"
    fp64: Any = SimpleNamespace(is_cuda=True, dtype=torch.float64, device=torch.device("cuda"))
    assert choose("op", fp64, CUDA, missing, install="make it") == "reference"
    set_backend("reference")
    assert choose("op", ON_GPU, CUDA, missing, install="make it") == "reference"


def test_an_op_without_the_chosen_backend_runs_what_it_has_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        set_backend("triton")
        assert choose("both", ON_GPU, BOTH) == "triton"
        assert choose("packed", ON_GPU, CUDA) == "cuda"
        assert choose("plain", ON_GPU, ("reference",)) == "reference"
        record("rope", "torch", "the only implementation")
        set_backend("cuda")
        assert choose("other", ON_GPU, BOTH) == "triton"
    assert [entry.getMessage() for entry in caplog.records] == [
        "both: triton (chosen explicitly)",
        "packed: cuda (has no triton implementation; CUDA tensor)",
        "plain: reference (has no triton implementation; the only implementation)",
        "rope: torch (has no triton implementation; the only implementation)",
        "other: triton (has no cuda implementation; CUDA tensor)",
    ]


def test_a_decision_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nibble.kernels"):
        for _ in range(3):
            choose("one", torch.zeros(1), BOTH)
        choose("two", torch.zeros(1), BOTH)
    assert [record.getMessage() for record in caplog.records] == [
        "one: reference (torch.float32 tensor on cpu)",
        "two: reference (torch.float32 tensor on cpu)",
    ]
    assert decisions() == {"one": "reference", "two": "reference"}


def test_the_launch_table_is_well_formed() -> None:
    for kernel, choices in LAUNCHES.items():
        assert choices[-1].cards == (), kernel
        for choice in choices:
            config = choice.launch
            for size in (config.rows, config.cols, config.warps):
                assert size > 0, kernel
                assert size & (size - 1) == 0, f"{kernel}: {size} is no power of two"
            assert config.chunk % config.rows == 0, kernel
        for card in (0, 80, 86, 89, 90, 120):
            sizes = [c.largest for c in choices if not c.cards or card in c.cards]
            assert sizes == sorted(sizes), f"{kernel}: a choice for sm_{card} is never reached"


def test_launch_takes_the_smallest_class_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, hopper = Launch(1, 64, 4), Launch(1, 128, 4), Launch(1, 64, 8)
    choices = (Choice(64, hopper, cards=(90,)), Choice(64, small), Choice(128, large))
    monkeypatch.setitem(LAUNCHES, "some_kernel", choices)
    x = torch.zeros(1)
    assert [launch("some_kernel", size, x) for size in (1, 64, 65, 128)] == [small, small, large, large]
    with as_on_card(90):
        assert launch("some_kernel", 64, x) == hopper
    with pytest.raises(ValueError, match="at most 128 channels, got 129"):
        launch("some_kernel", 129, x)


def test_unit_stride_copies_only_where_it_must() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert unit_stride(x[:, 1:3]).data_ptr() == x[:, 1:3].data_ptr()
    assert unit_stride(x.T).stride() == (3, 1)
    assert torch.equal(unit_stride(x.T), x.T)
