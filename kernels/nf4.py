"""NF4 storage with double quantisation, in bitsandbytes' format (QLoRA, arXiv 2305.14314).

The flattened weight is cut into blocks of 64 (blocks cross rows, the last may be short). A block keeps its largest
magnitude `absmax` and, for each value, the index of the nearest of 16 levels:

    code  = #{j : bound_j < w / absmax}         bound_j = midpoint of levels j and j+1            4 bits a weight
    w'    = level[code] * absmax                                                                  fp32, then cast

absmax is itself stored in 8 bits, in blocks of 256, around its mean over the tensor:

    absmax_code = map8((absmax - offset) / absmax2)      map8: bitsandbytes' signed dynamic map, 256 values
    absmax'     = map8[absmax_code] * absmax2 + offset

0.5 + 1/64 + 4/(64*256) = 0.5159 bytes a weight. Two nibbles share a byte, the first weight in the high one.

Quantizing is one torch rule for every device and equals bitsandbytes' CPU result bit for bit on finite weights; its
odd steps (a reciprocal in full blocks, a division in the short one; a 65,536-entry table in place of a search for the
absmax codes) are bitsandbytes' own and are kept for that reason. The mean runs on the CPU whatever the device; as in
bitsandbytes its last bit follows torch's summation order, so it may depend on torch's thread count.

Working memory: both directions go through the tensor in chunks and hold about 16 bytes for each weight of a chunk
(4 MiB on the CPU, 64 MiB on a GPU) and 8 for each block (0.13 a weight) besides input and output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share one absmax
BLOCK2 = 256  # absmax values that share one absmax2
CHUNK_CPU = 1 << 18  # weights handled at a time, a multiple of BLOCK: as many as fit a core's cache,
CHUNK_GPU = 1 << 22  # or as many as hide the launches
CHUNK2 = 1 << 16  # absmax values handled at a time, a multiple of BLOCK2
SMALLEST_ABSMAX = 1e-38  # below it a reciprocal overflows fp32

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class NF4Tensor:
    """A weight in 4 bits, or some rows of one. All tensors are contiguous and lie on one device; `dtype` is what
    `dequantize_nf4` returns by default."""

    codes: Tensor  # uint8 [ceil(n / 2)], two weights a byte, the first in the high nibble
    absmax_codes: Tensor  # uint8 [blocks], blocks = ceil(n / 64)
    absmax2: Tensor  # fp32 [ceil((first_block + blocks) / 256)]
    offset: Tensor  # fp32, one value: mean of absmax
    shape: tuple[int, int]
    dtype: torch.dtype
    first_block: int = 0  # blocks of absmax2's first group that lie before the first block here, 0..255

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return self.codes.nbytes + self.absmax_codes.nbytes + self.absmax2.nbytes + self.offset.nbytes

    def to(self, device: torch.device | str) -> NF4Tensor:
        return replace(
            self,
            codes=self.codes.to(device),
            absmax_codes=self.absmax_codes.to(device),
            absmax2=self.absmax2.to(device),
            offset=self.offset.to(device),
        )

    def rows(self, start: int, stop: int) -> NF4Tensor:
        """Rows start <= n < stop, as views of these tensors: their values are those of the whole weight.

        Raises ValueError where a bound is out of range or inside a block (the last row's end is never inside one).
        """
        rows, columns = self.shape
        if not 0 <= start < stop <= rows:
            raise ValueError(f"rows {start} to {stop} of a NF4 weight with {rows} rows")
        multiple = row_multiple(columns)
        if start % multiple or (stop % multiple and stop != rows):
            raise ValueError(
                f"rows {start} to {stop} of a NF4 weight {self.shape} cut a block of {BLOCK}: with {columns} columns "
                f"the bounds must be multiples of {multiple} rows, or the end"
            )
        first, last = start * columns // BLOCK, -(-stop * columns // BLOCK)
        group, first_block = divmod(self.first_block + first, BLOCK2)
        return replace(
            self,
            codes=self.codes[start * columns // 2 : (stop * columns + 1) // 2],
            absmax_codes=self.absmax_codes[first:last],
            absmax2=self.absmax2[group : -(-(self.first_block + last) // BLOCK2)],
            shape=(stop - start, columns),
            first_block=first_block,
        )

    def shard_rows(self, rank: int, world: int) -> NF4Tensor:
        """The rows of `rank` where `world` ranks share them equally, as views.

        Raises ValueError where equal shares would cut a block.
        """
        rows, columns = self.shape
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if rows % (world * row_multiple(columns)) and world > 1:
            raise ValueError(
                f"a NF4 weight {self.shape} in {world} equal shares of rows: with {columns} columns the rows of a "
                f"share must be a multiple of {row_multiple(columns)}"
            )
        return self.rows(rows * rank // world, rows * (rank + 1) // world)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class FusedNF4:
    """Weights that lie under each other (q/k/v, gate/up) without being copied: each keeps its offset and absmax2."""

    parts: tuple[NF4Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device | str) -> FusedNF4:
        return FusedNF4(tuple(part.to(device) for part in self.parts))


def concatenate_nf4(parts: Sequence[NF4Tensor]) -> FusedNF4:
    """The parts [N_i, K] as one weight [sum N_i, K].

    Raises ValueError where there are none or they differ in columns, dtype or device.
    """
    kinds = {(part.shape[1], part.dtype, part.device) for part in parts}
    if len(kinds) != 1:
        raise ValueError(
            "concatenate_nf4 takes one or more weights of equal columns, dtype and device, got "
            + (", ".join(f"{part.shape} {part.dtype} on {part.device}" for part in parts) or "none")
        )
    return FusedNF4(tuple(parts))


def row_multiple(columns: int) -> int:
    """The fewest rows of `columns` weights that end with a block."""
    return BLOCK // math.gcd(BLOCK, columns)


@torch.no_grad()
def quantize_nf4(weight: Tensor, name: str = "") -> NF4Tensor:
    """Quantize `weight` [N, K] (fp32, fp16 or bf16, finite, any strides) on its device.

    Raises ValueError for another dtype or rank, for an empty weight, and for the first non-finite value, which it
    reports by `name` and index.
    """
    label = name or "weight"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{label}: NF4 takes fp32, fp16 or bf16 weights, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{label}: NF4 takes a non-empty matrix [N, K], got shape {tuple(weight.shape)}")
    flat = weight.reshape(-1)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32)
    size = chunk(flat.device)
    for start in range(0, flat.numel(), size):
        some_codes, some_absmax = _quantize_chunk(flat, start, size, weight.shape[1], label)
        codes[start // 2 :][: len(some_codes)] = some_codes
        absmax[start // BLOCK :][: len(some_absmax)] = some_absmax
    offset = absmax.mean()
    groups = [_quantize_absmax(some - offset) for some in absmax.split(CHUNK2)]
    absmax_codes, absmax2 = (torch.cat(parts) for parts in zip(*groups, strict=True))
    return NF4Tensor(
        codes=codes,
        absmax_codes=absmax_codes.to(weight.device),
        absmax2=absmax2.to(weight.device),
        offset=offset.to(weight.device),
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
    )


def chunk(device: torch.device) -> int:
    """Weights handled at a time."""
    return CHUNK_CPU if device.type == "cpu" else CHUNK_GPU


def _quantize_chunk(flat: Tensor, start: int, size: int, columns: int, label: str) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(m / 2)] and absmax fp32 [ceil(m / 64)] of the m <= size weights from `start` on."""
    values = flat[start : start + size].float()
    full = values.numel() // BLOCK * BLOCK
    blocks = values[:full].view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    inverse = 1.0 / absmax.clamp(min=SMALLEST_ABSMAX)
    scaled = (blocks * inverse[:, None]).view(-1)
    if full < values.numel():
        tail = values[full:]
        tail_absmax = tail.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail / tail_absmax])
    if not bool(torch.isfinite(absmax).all()):
        index = start + int(torch.nonzero(~torch.isfinite(values))[0])
        where = (index // columns, index % columns)
        raise ValueError(f"{label}: value {flat[index].item()} at {list(where)}; NF4 takes finite weights only")
    if scaled.numel() % 2:
        scaled = F.pad(scaled, (0, 1))
    codes = _nearest_levels(scaled)
    return (codes[::2] << 4) | codes[1::2], absmax


def _nearest_levels(scaled: Tensor) -> Tensor:
    """Codes uint8 [m] of fp32 [m]: the bounds below each value, counted. On a CPU 15 vectorised comparisons take a
    quarter of a search's time."""
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, _level_bounds(scaled.device), out_int32=True).to(torch.uint8)
    codes = torch.zeros(scaled.shape, dtype=torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool)
    for bound in _level_bounds(scaled.device).tolist():
        codes += torch.gt(scaled, bound, out=above).view(torch.uint8)
    return codes


def _quantize_absmax(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [blocks] and absmax2 fp32 [ceil(blocks / 256)] of fp32 [blocks], on the CPU.

    As in bitsandbytes a value is first rounded to one of 65,536 even steps of [-1, 1]; a block of zeros gets code 0.
    """
    blocks = centred.numel()
    padded = F.pad(centred, (0, -blocks % BLOCK2)).view(-1, BLOCK2)
    absmax2 = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax2)[:, None]).clamp_(-1.0, 1.0)
    step = (scaled + 1.0) * 0.5 * 65535.0 + 0.5
    step.nan_to_num_(nan=0.0)  # 0 * inf: a zero block, or zeros beside a denormal absmax2
    return _absmax_table()[step.int()].view(-1)[:blocks], absmax2


@cache
def _absmax_table() -> Tensor:
    """Code of each of the 65,536 steps, uint8 on the CPU."""
    levels = dynamic_map(torch.device("cpu"))
    grid = torch.arange(65536, dtype=torch.float32) * 2.0 / 65535.0 - 1.0
    return torch.bucketize(grid, (levels[:-1] + levels[1:]) * 0.5).to(torch.uint8)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic 8-bit map, fp32 [256], ascending (8-bit optimizers, arXiv 2110.02861).

    Seven decades from 1e-6 to 1; the decade that ends at 10^-(6 - i) holds 2^i midpoints of an even grid on
    [0.1, 1], with either sign; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


@cache
def _level_bounds(device: torch.device) -> Tensor:
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return ((levels[:-1] + levels[1:]) / 2).to(device)
