"""Few rows of x times packed weights, in one launch of csrc: what decoding is made of.

    y_i[t, n] = sum_k x[t, k] w_i[n, k] + bias_i[n]        x [M, K], M <= 64, fp16 or bf16; y_i [M, N_i]

The weights w_i (NF4 or int8) share x: q, k, v; gate, up. Their codes are read once and never written out as 16 bits:
0.516 bytes a weight (int8: 1 + 4/K) where unpacking first moves 4.5. x is read once for each tile of rows of w, from
the L2 cache. Sums are fp32. Where the tiles are too few to fill the card, `splits` blocks share a tile's columns; their
sums go through an fp32 workspace [splits, M, sum N_i], written and read once, and are added in order, so the same call
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dequantize_nf4, int8, library
from kernels.dispatch import PRIMITIVES, card, on_another_card, primitive, processors
from kernels.int8 import Int8Tensor
from kernels.launches import FEW_ROWS, MOST_FEW_ROWS
from kernels.nf4 import FusedNF4, NF4Tensor

Packed = NF4Tensor | FusedNF4 | Int8Tensor

BLOCK_COLUMNS = 64  # K that is no multiple of it has a kernel without splits
MOST_SPLITS = 8


class _Tile(NamedTuple):
    """What csrc/linear_launch.cuh gives a block, by the rows of x, and predictions of what that takes."""

    tokens: int  # up to
    rows: int  # of w
    blocks: int  # that take the same rows of w, for other tokens
    us: float  # a block needs for 1,024 columns


TILES = (_Tile(4, 16, 1, 0.3), _Tile(16, 32, 1, 0.6), _Tile(32, 128, 1, 4.0), _Tile(64, 128, 2, 4.0))
SECOND_KERNEL_US, SPLIT_VALUE_US = 2.0, 2e-6  # to add the splits up: once, and for each value of each split


_override: list[int] = []


def set_few_rows(rows: int | None) -> None:
    """From now on the fused product takes up to `rows` rows (0: none), or what the card's table says (None).

    Raises ValueError for more than 64, the most that it can take.
    """
    if rows is not None and not 0 <= rows <= MOST_FEW_ROWS:
        raise ValueError(f"the fused product takes 0 to {MOST_FEW_ROWS} rows, got {rows}")
    _override[:] = [] if rows is None else [rows]


def most_few_rows(x: Tensor) -> int:
    """Up to how many rows of `x` the fused product is chosen on its card."""
    return _override[0] if _override else FEW_ROWS.get(card(x), MOST_FEW_ROWS)


def why_few_rows(x: Tensor) -> str:
    """Where that number comes from."""
    if _override:
        return "set_few_rows"
    return f"a prediction for sm_{card(x)}, kernels/launches.py" if x.is_cuda else "emulated"


@cache
def splits_of(tokens: int, rows: tuple[int, ...], columns: int, processors: int) -> int:
    """Blocks that share the columns of a tile, for `tokens` rows of x and weights of `rows` rows: as many as shorten
    the product by more than adding them up takes (csrc/nibble.h has the rule)."""
    if columns % BLOCK_COLUMNS:
        return 1
    tile = next(tile for tile in TILES if tokens <= tile.tokens)
    blocks = tile.blocks * sum((n + tile.rows - 1) // tile.rows for n in rows)

    def us(splits: int) -> float:
        turns = max(1, -(-blocks * splits // processors))
        adding = SECOND_KERNEL_US + splits * tokens * sum(rows) * SPLIT_VALUE_US
        return turns / splits * tile.us * columns / 1024 + (adding if splits > 1 else 0.0)

    return min(range(1, MOST_SPLITS + 1), key=us)


def takes(weights: Sequence[Packed]) -> bool:
    """Whether one launch takes all of these."""
    eight = [q for q in weights if isinstance(q, Int8Tensor)]
    four = [dequantize_nf4.parts_of(q) for q in weights if not isinstance(q, Int8Tensor)]
    return (not eight or not four) and len(eight) + sum(map(len, four)) <= library.MAX_PARTS


def few_rows(x: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The y_i [M, N_i] of x [M, K], unit last stride, and weights that `takes` accepts.

    Raises ValueError where a weight or a bias is on another device: csrc sees only addresses.
    """
    for each in (*weights, *biases):
        if each is not None and each.device != x.device:
            raise ValueError(f"x is on {x.device}, a weight or bias that it is multiplied by is on {each.device}")
    (tokens, columns), biases = x.shape, [None if bias is None else bias.contiguous() for bias in biases]
    eight = [q for q in weights if isinstance(q, Int8Tensor)]
    if eight:
        splits = splits_of(tokens, tuple(q.shape[0] for q in eight), columns, processors(x))
        return tuple(_quickest("few_rows_int8", x)(x, *int8.arguments_of(eight), biases, splits))
    four = [dequantize_nf4.parts_of(q) for q in weights if not isinstance(q, Int8Tensor)]
    arguments = dequantize_nf4.arguments_of([part for parts in four for part in parts])
    splits = splits_of(tokens, tuple(arguments[4]), columns, processors(x))
    shares = [len(parts) for parts in four]
    return tuple(_quickest("few_rows_nf4", x)(x, *arguments, shares, biases, splits))


def _quickest(primitive: str, x: Tensor) -> Callable[..., list[Tensor]]:
    """The launcher itself for plain tensors, past torch's dispatcher, which these ops need for nothing else than
    compiling and fake tensors: a third of the host time, and decoding without a graph waits for the host."""
    registered = PRIMITIVES[primitive]
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not on_another_card()
    return registered.launcher if plain else registered.op


def _fake_nf4(
    x: Tensor, codes: list[Tensor], absmax_codes: list[Tensor], absmax2: list[Tensor], offsets: list[Tensor],
    rows: list[int], first_blocks: list[int], shares: list[int], biases: list[Tensor | None], splits: int,
) -> list[Tensor]:  # fmt: skip
    return _outputs(x, rows, shares)


@primitive(
    "few_rows_nf4(Tensor x, Tensor[] codes, Tensor[] absmax_codes, Tensor[] absmax2, Tensor[] offsets, int[] rows,"
    " int[] first_blocks, int[] shares, Tensor?[] biases, int splits) -> Tensor[]",
    fake=_fake_nf4,
)
def few_rows_nf4(
    x: Tensor, codes: list[Tensor], absmax_codes: list[Tensor], absmax2: list[Tensor], offsets: list[Tensor],
    rows: list[int], first_blocks: list[int], shares: list[int], biases: list[Tensor | None], splits: int,
) -> list[Tensor]:  # fmt: skip
    """Up to 4 parts [rows_i, K]; y_j [M, sum of the rows of its shares_j parts], biases_j as long or None."""
    structs = dequantize_nf4.structs_of(codes, absmax_codes, absmax2, offsets, rows, first_blocks)
    tensors = [*codes, *absmax_codes, *absmax2, *offsets]
    return _launch("nibble_linear_nf4", structs, tensors, x, rows, shares, biases, splits)


def _fake_int8(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], biases: list[Tensor | None], splits: int
) -> list[Tensor]:
    return _outputs(x, [code.shape[0] for code in codes], [1] * len(codes))


@primitive(
    "few_rows_int8(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] biases, int splits) -> Tensor[]",
    fake=_fake_int8,
)
def few_rows_int8(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], biases: list[Tensor | None], splits: int
) -> list[Tensor]:
    """Up to 4 weights, codes [N_i, K] and scales [N_i]; y_i [M, N_i], biases_i [N_i] or None."""
    rows, structs = [code.shape[0] for code in codes], int8.structs_of(codes, scales)
    return _launch("nibble_linear_int8", structs, [*codes, *scales], x, rows, [1] * len(codes), biases, splits)


def _outputs(x: Tensor, rows: list[int], shares: list[int]) -> list[Tensor]:
    """y_j [M, sum of the rows of its parts]."""
    outputs, first = [], 0
    for share in shares:
        outputs.append(x.new_empty(x.shape[0], sum(rows[first : first + share])))
        first += share
    return outputs


def _launch(
    function: str, structs: Any, packed: list[Tensor], x: Tensor, rows: list[int], shares: list[int],
    biases: list[Tensor | None], splits: int,
) -> list[Tensor]:  # fmt: skip
    tokens, columns = x.shape
    ys = _outputs(x, rows, shares)
    tensors, places, part = [x, *packed, *ys], [], 0
    for y, share, bias in zip(ys, shares, biases, strict=True):
        if bias is not None:
            tensors.append(bias)
        offset, stride, size = 0, y.shape[1], y.element_size()
        for _ in range(share):
            at = None if bias is None else bias.data_ptr() + offset
            places.append(library.Output(at, y.data_ptr() + offset, stride))
            offset += rows[part] * size
            part += 1
    workspace = None
    if splits > 1:
        workspace = x.new_empty(splits * tokens * sum(rows), dtype=torch.float32)
        tensors.append(workspace)
    x_stride = x.stride(0) if tokens > 1 else columns  # that of a single row may be anything, an unaligned one too
    library.call(
        function, tensors, structs, (library.Output * len(places))(*places), len(places), columns,
        x.data_ptr(), x_stride, tokens, library.DTYPES[x.dtype], splits,
        None if workspace is None else workspace.data_ptr(), 0 if workspace is None else workspace.nbytes,
    )  # fmt: skip
    return ys
