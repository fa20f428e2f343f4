"""csrc's fused products for few rows, on a GPU where csrc is built, else in the emulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import library
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.int8 import Int8Tensor, dequantize_int8, quantize_int8
from kernels.nf4 import BLOCK, BLOCK2, NF4Tensor, quantize_nf4
from tests.kernels.tolerance import assert_within_twice

DTYPES = [torch.float16, torch.bfloat16]
FORMATS = ["nf4", "int8"]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if torch.cuda.is_available() and not library.missing():
        return torch.device("cuda")
    monkeypatch.setenv("NIBBLE_EMULATE", "1")
    if why := library.available_for(torch.empty(1)):
        pytest.skip(why)
    return torch.device("cpu")


@dataclass
class Weight:
    """A part, its weight in fp32, and its struct."""

    tensors: list[Tensor]
    dense: Tensor  # fp32 [rows, columns]
    struct: library.NF4 | library.Int8


def nf4(q: NF4Tensor, first_block: int = 0) -> Weight:
    tensors = [q.codes, q.absmax_codes, q.absmax2, q.offset]
    struct = library.NF4(*[x.data_ptr() for x in tensors], q.shape[0], first_block)
    return Weight(tensors, dequantize_nf4_reference(q, torch.float32), struct)


def int8(q: Int8Tensor) -> Weight:
    struct = library.Int8(q.codes.data_ptr(), q.scale.data_ptr(), q.shape[0])
    return Weight([q.codes, q.scale], dequantize_int8(q, torch.float32), struct)


def weight(form: str, rows: int, columns: int, device: torch.device) -> Weight:
    dense = torch.randn(rows, columns) * torch.rand(rows, 1) * columns**-0.5
    return nf4(quantize_nf4(dense).to(device)) if form == "nf4" else int8(quantize_int8(dense).to(device))


def run(parts: Sequence[Weight], x: Tensor, biases: Sequence[Tensor | None], splits: int = 1, gap: int = 0,
        tokens: int | None = None, workspace_bytes: int | None = None) -> list[Tensor]:  # fmt: skip
    """x [tokens, columns] times each part; the results' rows lie `gap` elements further apart than need be."""
    nf4 = isinstance(parts[0].struct, library.NF4)
    wide = [x.new_full((len(x), len(part.dense) + gap), torch.nan) for part in parts]
    ys = [y[:, : len(part.dense)] for y, part in zip(wide, parts, strict=True)]
    workspace = torch.full((splits, len(x), sum(len(part.dense) for part in parts)), torch.nan, device=x.device)
    structs: object
    if nf4:
        structs = (library.NF4 * len(parts))(*[part.struct for part in parts if isinstance(part.struct, library.NF4)])
    else:
        structs = (library.Int8 * len(parts))(*[part.struct for part in parts if isinstance(part.struct, library.Int8)])
    outputs = (library.Output * len(parts))(
        *[
            library.Output(None if bias is None else bias.data_ptr(), y.data_ptr(), y.stride(0))
            for bias, y in zip(biases, ys, strict=True)
        ]
    )
    tensors = [x, *ys, workspace, *[bias for bias in biases if bias is not None]]
    for part in parts:
        tensors += part.tensors
    library.call("nibble_linear_nf4" if nf4 else "nibble_linear_int8", tensors, structs, outputs, len(parts),
                 x.shape[1], x.data_ptr(), x.stride(0), len(x) if tokens is None else tokens,
                 library.DTYPES[x.dtype], splits, workspace.data_ptr() if splits > 1 else None,
                 workspace.nbytes if workspace_bytes is None else workspace_bytes)  # fmt: skip
    assert all(y[:, len(part.dense) :].isnan().all() for y, part in zip(wide, parts, strict=True))  # the gaps
    return ys


def check(parts: Sequence[Weight], x: Tensor, biases: Sequence[Tensor | None], splits: int = 1, gap: int = 0) -> None:
    ours = torch.cat(run(parts, x, biases, splits, gap), dim=1)
    dense = torch.cat([part.dense for part in parts])
    bias = torch.cat([x.new_zeros(len(part.dense)) if b is None else b for part, b in zip(parts, biases, strict=True)])
    reference = F.linear(x.double(), dense.double(), bias.double())
    what = f"{tuple(x.shape)} by {[len(part.dense) for part in parts]}, {splits} splits"
    assert_within_twice(ours, F.linear(x, dense.to(x.dtype), bias), reference, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(33, 64), (129, 128), (50, 704), (1000, 192), (17, 4096)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 31, 33, 57, 64])
def test_error_is_torchs_own(device: torch.device, tokens: int, rows: int, columns: int, form: str,
                             dtype: torch.dtype) -> None:  # fmt: skip
    torch.manual_seed(tokens + rows)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    bias = torch.randn(rows, device=device).to(dtype) if tokens % 2 else None
    check([weight(form, rows, columns, device)], x, [bias])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", range(1, 65))
def test_every_number_of_tokens(device: torch.device, tokens: int, form: str) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 128, device=device).bfloat16()
    check([weight(form, 40, 128, device)], x, [None])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [
    (1, 9, 70), (9, 33, 2730), (3, 8, 4304), (64, 5, 66), (2, 7, 65), (1, 3, 1), (5, 4, 63),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_columns(device: torch.device, tokens: int, rows: int, columns: int, form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    bias = torch.randn(rows, device=device).to(dtype)
    check([weight(form, rows, columns, device)], x, [bias], splits=1 + tokens % 2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_parts_and_splits(device: torch.device, tokens: int, splits: int, form: str) -> None:
    torch.manual_seed(splits)
    columns = 704
    parts = [weight(form, rows, columns, device) for rows in (160, 33, 1, 70)]
    x = torch.randn(tokens, columns + 24, device=device).half()[:, 8:-16]  # rows apart, 16-byte aligned
    biases = [torch.randn(160, device=device).half(), None, None, torch.randn(70, device=device).half()]
    check(parts, x, biases, splits, gap=3)
    check(parts[1:], x, biases[1:], splits)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("columns", [128, 70])
def test_part_without_rows(device: torch.device, columns: int, form: str) -> None:
    torch.manual_seed(2)
    empty, full = weight(form, 5, columns, device), weight(form, 20, columns, device)
    empty.struct.rows, empty.dense = 0, empty.dense[:0]
    x = torch.randn(3, columns, device=device).half()
    for parts in ([empty, full], [full, empty], [full, empty, full], [empty]):
        check(parts, x, [None] * len(parts), splits=2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("splits", [1, 3])
def test_unaligned_activations_and_codes(device: torch.device, splits: int, form: str) -> None:
    torch.manual_seed(5)
    part = weight(form, 40, 192, device)
    wide = torch.randn(5, 200, device=device).half()
    check([part], wide[:, 1:193], [None], splits)  # base
    check([part], torch.randn(5, 195, device=device).half()[:, :192], [None], splits)  # row stride
    shifted = torch.empty(part.tensors[0].numel() + 1, dtype=part.tensors[0].dtype, device=device)[1:]
    part.tensors[0] = shifted.copy_(part.tensors[0].flatten())
    part.struct.codes = shifted.data_ptr()
    check([part], wide[:, :192], [None], splits)


@pytest.mark.parametrize("columns", [128, 70 * 64, 70])
def test_rows_from_the_middle(device: torch.device, columns: int) -> None:
    """A slice on block boundaries keeps its place in its absmax2 groups."""
    torch.manual_seed(3)
    step = BLOCK if columns % BLOCK else 1
    rows, skipped = (64, 3) if step == 1 else (4 * BLOCK, BLOCK)
    whole = quantize_nf4(torch.randn(rows, columns) * torch.rand(rows, 1)).to(device)
    first = skipped * columns // BLOCK
    rest = replace(whole, codes=whole.codes[first * BLOCK // 2 :], absmax_codes=whole.absmax_codes[first:],
                   absmax2=whole.absmax2[first // BLOCK2 :], shape=(rows - skipped, columns))  # fmt: skip
    part = nf4(rest, first % BLOCK2)
    part.dense = dequantize_nf4_reference(whole, torch.float32)[skipped:]
    for tokens in (1, 20):
        check([part], torch.randn(tokens, columns, device=device).bfloat16(), [None])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "columns", "splits"), [(1, 2048, 1), (8, 2112, 2), (20, 704, 3), (64, 320, 1), (9, 70, 1)]
)
def test_same_bits_again_and_in_another_order(device: torch.device, tokens: int, columns: int, splits: int,
                                              form: str) -> None:  # fmt: skip
    torch.manual_seed(tokens)
    parts = [weight(form, rows, columns, device) for rows in (65, 30)]
    x = torch.randn(tokens, columns, device=device).bfloat16()
    first = run(parts, x, [None, None], splits)
    with reversed_order(device):
        second = run(parts, x, [None, None], splits)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert torch.isfinite(one).all()


@contextmanager
def reversed_order(device: torch.device) -> Iterator[None]:
    """The emulator's blocks and threads run in falling order."""
    emulator = library._emulated()[0] if device.type == "cpu" else None
    if emulator is not None:
        emulator.loaded.nibble_emulator_reverse(1)
    try:
        yield
    finally:
        if emulator is not None:
            emulator.loaded.nibble_emulator_reverse(0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [4, 5, 12, 20, 40])
@pytest.mark.parametrize("columns", [320, 70])
def test_infinities_stay_in_their_token(device: torch.device, columns: int, tokens: int, form: str) -> None:
    """The last token's too, which the lanes of missing tokens read again."""
    torch.manual_seed(6)
    part = weight(form, 40, columns, device)
    x = torch.randn(tokens, columns, device=device).half()
    clean = run([part], x, [None])[0]
    for spoiled in (3, tokens - 1):
        one = x.clone()
        one[spoiled, columns - 1] = torch.inf
        y = run([part], one, [None])[0]
        others = [token for token in range(tokens) if token != spoiled]
        assert not torch.isfinite(y[spoiled]).any()
        assert torch.equal(y[others], clean[others])
        assert torch.equal(torch.isnan(y[spoiled]), torch.isnan(F.linear(one[spoiled], part.dense.half())))


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_arguments(device: torch.device, form: str) -> None:
    part = weight(form, 8, 64, device)
    x = torch.randn(2, 64, device=device).half()
    for tokens in (0, 65, -1):
        with pytest.raises(RuntimeError, match="tokens is not 1 to 64"):
            run([part], x, [None], tokens=tokens)
    with pytest.raises(RuntimeError, match="dtype"):
        run([part], x.float(), [None])
    with pytest.raises(RuntimeError, match="parts is not 1 to 4"):
        run([part] * 5, x, [None] * 5)
    with pytest.raises(RuntimeError, match="workspace"):
        run([part], x, [None], splits=2, workspace_bytes=4 * 2 * 2 * 8 - 1)
    with pytest.raises(RuntimeError, match="splits is below 1"):
        run([part], x, [None], splits=0)
    with pytest.raises(RuntimeError, match="columns"):
        run([part], x[:, :0], [None])
    part.struct.rows = -1
    with pytest.raises(RuntimeError, match="negative"):
        run([part], x, [None])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("tokens", "tile", "reads", "columns"), [
    (1, 16, 1, 4096), (4, 16, 1, 704), (8, 32, 1, 4096), (16, 32, 1, 4096), (32, 128, 1, 4096), (64, 128, 2, 4096),
])  # fmt: skip
def test_bytes_over_the_least(device: torch.device, tokens: int, tile: int, reads: int, columns: int,
                              form: str) -> None:  # fmt: skip
    """Codes are loaded once, for more than 32 tokens twice (then by two blocks side by side, one of them from L2); x is
    loaded by each row tile, in tiles of tokens (the lanes of a missing one load the last one's addresses)."""
    if device.type == "cuda":
        pytest.skip("the emulator counts")
    rows = 2 * tile
    part = weight(form, rows, columns, device)
    x = torch.randn(tokens, columns).bfloat16()
    with library.counting() as counts:
        y = run([part], x, [None])[0]
    found = {access.tensor.data_ptr(): access for access in counts}

    def ratios(tensor: Tensor) -> tuple[float, float]:
        access = found[tensor.data_ptr()]
        return access.loaded / tensor.nbytes, access.loaded_distinct / tensor.nbytes

    codes = part.tensors[0]
    assert ratios(codes) == (reads, 1)
    token_tiles = {1: 1, 4: 1, 8: 1, 16: 2, 32: 4, 64: 8}[tokens]
    assert ratios(x) == (rows / tile * tile_warps(tokens) * 8 * token_tiles / tokens, 1)
    stored = found[y.data_ptr()]
    assert stored.stored == stored.stored_distinct == y.nbytes
    if form == "nf4":
        issued, distinct = ratios(part.tensors[1])
        whole_units = -(-columns // 256) * 256  # the lanes of missing blocks load the last one's byte again
        assert (issued, distinct) == (reads * whole_units / columns, 1)


def tile_warps(tokens: int) -> int:
    """Warps under each other, which load the same x."""
    return 4 if tokens > 16 else 1
