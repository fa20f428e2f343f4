"""The fused product: error of at most twice torch's own, for every number of rows, and when it is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import few_rows as module
from kernels import frozen_linear, library
from kernels import lora_linear as lora_linear_module
from kernels.few_rows import few_rows, most_few_rows, set_few_rows, splits_of
from kernels.launches import FEW_ROWS, MOST_FEW_ROWS
from kernels.nf4 import concatenate_nf4
from tests.kernels.packed import INT8, KINDS, NF4, ON_GPU, Kind, expressions
from tests.kernels.packed import csrc as csrc
from tests.kernels.tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("csrc")
DTYPES = [torch.float16, torch.bfloat16]


def check(kind: Kind, x: Tensor, qs: list[Any], biases: list[Tensor | None], what: str = "") -> None:
    ours = few_rows(x, qs, biases)
    assert len(ours) == len(qs)
    for y, expected, exact in zip(ours, *expressions(kind, x, qs, biases), strict=True):
        assert_within_twice(y, expected, exact, what)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    """An odd number of weight rows; whole blocks of 64 columns, and columns that no vector load fits."""
    for columns in (320, 131):
        torch.manual_seed(columns)
        q, bias = kind.draw(33, columns, dtype, device), torch.randn(33).to(device, dtype)
        x = torch.randn(MOST_FEW_ROWS, columns).to(device, dtype)
        for rows in range(1, MOST_FEW_ROWS + 1):
            check(kind, x[-rows:], [q], [bias], f"{rows} rows of {columns}")


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (17, 2730), (64, 4304), (20, 4096), (33, 4096)])
def test_columns_of_models(kind: Kind, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """4,096 are split between blocks."""
    torch.manual_seed(rows)
    check(kind, torch.randn(rows, columns).to(device, dtype), [kind.draw(19, columns, dtype, device)], [None])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_share_x_in_one_launch(
    kind: Kind, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[str] = []
    launch = library.call
    monkeypatch.setattr(library, "call", lambda name, *rest: (calls.append(name), launch(name, *rest)))
    qs = [kind.draw(rows, 192, dtype, device) for rows in (40, 7, 1, 33)]
    check(kind, torch.randn(5, 192).to(device, dtype), qs, [None, torch.randn(7).to(device, dtype), None, None])
    assert calls == [f"nibble_linear_{kind.name}"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_fused_weight_write_into_one_result(dtype: torch.dtype, device: torch.device) -> None:
    """Slices of rows too, whose first block is not the first of its group."""
    torch.manual_seed(1)
    slices = [NF4.draw(400, 64, dtype, device).rows(*bounds) for bounds in ((7, 40), (300, 333))]
    fused, single = concatenate_nf4(slices), NF4.draw(20, 64, dtype, device)
    assert slices[1].first_block
    x, bias = torch.randn(9, 64).to(device, dtype), torch.randn(66).to(device, dtype)
    check(NF4, x, [single, fused], [None, bias])


@KINDS
def test_rows_may_lie_apart_and_anywhere(kind: Kind, device: torch.device) -> None:
    torch.manual_seed(2)
    q, bias = kind.draw(40, 192, torch.float16, device), torch.randn(80).to(device, torch.float16)[::2]
    wide = torch.randn(12, 500).to(device, torch.float16)
    single = torch.randn(192, 1).to(device, torch.float16).T
    for x in (wide[:, 8:200], wide[:, 3:195], wide[::5, 64:256], wide[:1, 1:193].expand(6, 192), single):
        check(kind, x, [q], [bias], str(x.stride()))


@KINDS
def test_splits_change_no_bit_from_call_to_call(kind: Kind, device: torch.device) -> None:
    torch.manual_seed(3)
    q, x = kind.draw(48, 4096, torch.float16, device), torch.randn(17, 4096).to(device, torch.float16)
    assert splits_of(17, (48,), 4096, 4) == 4
    assert torch.equal(few_rows(x, [q], [None])[0], few_rows(x, [q], [None])[0])


@KINDS
@pytest.mark.parametrize("case", range(200 if ON_GPU else 4))
def test_random_shapes(kind: Kind, case: int, device: torch.device) -> None:
    torch.manual_seed(case)
    most = (64, 4000, 6000) if ON_GPU else (64, 60, 1500)
    rows, n, columns = (int(torch.randint(1, limit + 1, ())) for limit in most)
    columns = columns if case % 2 else -(-columns // 64) * 64
    dtype, count = DTYPES[case // 2 % 2], 1 + case % 3
    qs = [kind.draw(n + i, columns, dtype, device) for i in range(count)]
    biases = [torch.randn(n + i).to(device, dtype) if i != 1 else None for i in range(count)]
    check(kind, torch.randn(rows, columns).to(device, dtype), qs, biases, f"{rows}, {n}, {columns}")


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "splits"),
    [
        (1, (4096,), 4096, 1),  # a second kernel would take longer than the idle processors lose
        (1, (1024,), 4096, 1),
        (1, (1024,), 14336, 2),
        (16, (4096,), 4096, 1),
        (32, (4096,), 4096, 4),  # 32 blocks of 128 rows for 132 processors
        (32, (4096, 4096, 4096), 4096, 1),
        (64, (4096,), 4096, 2),
        (32, (4096,), 4304, 1),  # the kernel for such columns knows no splits
        (64, (64,), 64, 1),
    ],
)
def test_splits_fill_the_card_where_that_pays(tokens: int, rows: tuple[int, ...], columns: int, splits: int) -> None:
    assert splits_of(tokens, rows, columns, 132) == splits


def test_the_launcher_itself_is_called_for_plain_tensors_only() -> None:
    registered = module.PRIMITIVES["few_rows_nf4"]
    assert module._quickest("few_rows_nf4", torch.empty(1)) is registered.launcher
    assert module._quickest("few_rows_nf4", torch.nn.Parameter(torch.empty(1))) is registered.op


def test_what_one_launch_takes(device: torch.device) -> None:
    four, eight = (kind.draw(8, 64, torch.float16, device) for kind in (NF4, INT8))
    assert module.takes([four, concatenate_nf4([four] * 3)])
    assert not module.takes([four, concatenate_nf4([four] * 4)])
    assert module.takes([eight] * 4)
    assert not module.takes([four, eight])


@KINDS
def test_weights_and_biases_elsewhere_are_refused(kind: Kind, device: torch.device) -> None:
    """A kernel would read their addresses on its own device."""
    q, x = kind.draw(8, 64, torch.float16, device), torch.zeros(2, 64, dtype=torch.float16, device=device)
    bias = torch.zeros(8, dtype=torch.float16, device="meta")
    for weight, its_bias in ((q.to("meta"), None), (q, bias)):
        with pytest.raises(ValueError, match=f"x is on {device}.*is on meta"):
            kind.linear(x, weight, its_bias)


def test_the_limit_is_the_cards_or_the_one_that_was_set() -> None:
    x = torch.empty(1)
    assert set(FEW_ROWS) == {80, 86, 89, 90, 120}
    assert max(FEW_ROWS.values()) <= MOST_FEW_ROWS
    assert ON_GPU or most_few_rows(x) == MOST_FEW_ROWS
    try:
        set_few_rows(7)
        assert most_few_rows(x) == 7
        with pytest.raises(ValueError, match="0 to 64 rows, got 65"):
            set_few_rows(65)
    finally:
        set_few_rows(None)
    assert ON_GPU or most_few_rows(x) == MOST_FEW_ROWS


def test_frozen_linears_take_it_up_to_the_limit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def fused(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        taken.append(x.shape[0])
        return few_rows(x, *rest)

    monkeypatch.setattr(frozen_linear, "few_rows", fused)
    q = NF4.draw(8, 64, torch.float16, device)
    a, b = torch.zeros(2, 64, device=device), torch.zeros(8, 2, device=device)
    try:
        set_few_rows(3)
        for rows in (0, 1, 3, 4):
            NF4.linear(torch.zeros(rows, 64, dtype=torch.float16, device=device), q)
        assert taken == [1, 3]
        NF4.linear(torch.zeros(3, 64, device=device), q)  # fp32
        NF4.linears(torch.zeros(1, 64, dtype=torch.float16, device=device), [q] * 5)  # more than one launch takes
        assert taken == [1, 3]
        x = torch.zeros(2, 64, dtype=torch.float16, device=device)
        lora_linear_module._LoraLinears.apply(x, None, (q,), (None,), 1.0, 0.0, 0, a, b)
        assert taken == [1, 3, 2]
    finally:
        set_few_rows(None)
