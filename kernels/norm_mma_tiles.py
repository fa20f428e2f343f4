"""What the kernels over tokens of norm_mma_kernels.py load and in which shape.

A row's channels come in tiles of COLS, half of each tile from each group's half of the row. A tile is cut into BANDS
bands of BAND channels, [ROWS, BANDS, BAND], the first half of the bands from the first group: products are batched over
the bands, one for each warp, because a tile of few rows has too little for several warps to share otherwise.

A group's h/2 codes are padded to G, a power of two of at least 4: codes are [ROWS, 2, G] (group, code). What multiplies
a group's half of W are its slots, [ROWS, 2, 2, G] (kind, path, code): of kind 0 both paths' codes, of kind 1 both
paths' biases, where the first code is one and the others do not exist. 4 G is at least 16, tl.dot's smallest inner
dimension.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_channels(
    i: tl.tensor, CHANNELS: tl.constexpr, COLS: tl.constexpr, BANDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Channels of tile i and whether they exist, [1, BANDS, BAND]. Only a ragged last tile is looked at."""
    band = tl.arange(0, BANDS)[None, :, None]
    within = band % (BANDS // 2) * (COLS // BANDS) + tl.arange(0, COLS // BANDS)[None, None, :] + i * (COLS // 2)
    inside = tl.full([1, BANDS, COLS // BANDS], True, tl.int1)
    if CHANNELS % COLS != 0:
        inside = within < CHANNELS // 2
    return band // (BANDS // 2) * (CHANNELS // 2) + within, inside


@triton.jit
def load_tile(
    ptr: tl.tensor | None,
    stride: tl.tensor,
    i: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
    BANDS: tl.constexpr,
) -> tl.tensor | None:
    """Tile i of rows [ROWS, 1, 1], zero where not live; None of an absent tensor."""
    tile = None
    if ptr is not None:
        cols, inside = tile_channels(i, CHANNELS, COLS, BANDS)
        tile = tl.load(ptr + rows * stride + cols, mask=inside & live, other=0.0)
    return tile


@triton.jit
def add(x: tl.tensor, delta: tl.tensor | None) -> tl.tensor:
    """The residual stream, rounded to x's dtype."""
    if delta is not None:
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def load_vector(ptr: tl.tensor, cols: tl.tensor, inside: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """A parameter of the norm as fp32 [ROWS, BANDS, BAND]: in the tile's layout, where each thread loads it once."""
    at = tl.broadcast_to(ptr + cols, (ROWS, cols.shape[1], cols.shape[2]))
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_down(
    packed_ptr: tl.tensor,
    cols: tl.tensor,
    inside: tl.tensor,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """weight * down_w as [BANDS, N, BAND], N >= 2 G; zero for codes that do not exist."""
    code = tl.arange(0, N)[:, None, None]
    row = code // G * (H // 2) + code % G
    real = (code < 2 * G) & (code % G < H // 2)
    return tl.permute(tl.load(packed_ptr + row * CHANNELS + cols, mask=inside & real, other=0.0), (1, 0, 2))


@triton.jit
def load_up(
    packed_ptr: tl.tensor,
    cols: tl.tensor,
    inside: tl.tensor,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
) -> tl.tensor:
    """scale * W as [BANDS, K, BAND]; zero for slots that do not exist."""
    slot = tl.arange(0, 4 * G)[:, None, None]
    path = slot // G % 2
    is_code = slot < 2 * G
    row = H + tl.where(is_code, path * (H // 2) + slot % G, H + path)
    real = slot % G < tl.where(is_code, H // 2, 1)
    return tl.permute(tl.load(packed_ptr + row * CHANNELS + cols, mask=inside & real, other=0.0), (1, 0, 2))


@triton.jit
def load_mix(
    mix_ptr: tl.tensor, row_ptr: tl.tensor | None, first: tl.tensor, ROWS: tl.constexpr, tokens: tl.tensor
) -> tl.tensor:
    """m of ROWS tokens from `first` on as [1, ROWS, 1, 2, 1], to multiply slots."""
    at = first + tl.arange(0, ROWS)
    live = at < tokens
    if row_ptr is not None:
        at = tl.load(row_ptr + at, mask=live, other=0).to(tl.int64)
    m = tl.load(mix_ptr + at[:, None] * 2 + tl.arange(0, 2)[None, :], mask=live[:, None], other=0.0)
    return m[None, :, None, :, None]


@triton.jit
def codes(rows: tl.tensor, H: tl.constexpr, G: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where the codes of rows [ROWS, 1, 1] lie in [T, h], and whether they exist: [ROWS, 2, G]."""
    code = tl.arange(0, G)[None, None, :]
    return rows * H + tl.arange(0, 2)[None, :, None] * (H // 2) + code, code < H // 2


@triton.jit
def to_slots(u: tl.tensor) -> tl.tensor:
    """Codes [ROWS, 2, G] -> slots [2, ROWS, 2, 2, G], before they are mixed."""
    ROWS: tl.constexpr = u.shape[0]
    G: tl.constexpr = u.shape[2]
    codes = tl.permute(tl.broadcast_to(u[:, :, None, None, :], (ROWS, 2, 2, 2, G)), (1, 0, 2, 3, 4))
    biases = tl.where(tl.arange(0, G) == 0, 1.0, 0.0)[None, None, None, None, :]
    return tl.where(tl.arange(0, 2)[None, None, :, None, None] == 0, codes, biases)


@triton.jit
def to_bands(v: tl.tensor, BANDS: tl.constexpr) -> tl.tensor:
    """[groups, ROWS, K] -> [BANDS, ROWS, K], each band with the codes of its group."""
    groups: tl.constexpr = v.shape[0]
    v = tl.broadcast_to(v[:, None, :, :], (groups, BANDS // groups, v.shape[1], v.shape[2]))
    return tl.reshape(v, (BANDS, v.shape[2], v.shape[3]))


@triton.jit
def centred(x: tl.tensor, mean: tl.tensor, inside: tl.tensor, LAYER_NORM: tl.constexpr) -> tl.tensor:
    """fp32 x - mean, zero outside; RMSNorm: x."""
    x = x.to(tl.float32)
    if LAYER_NORM:
        x = tl.where(inside, x - mean, 0.0)
    return x


@triton.jit
def by_eight(x: tl.tensor) -> tl.tensor:
    """[ROWS, BANDS, BAND] -> [ROWS, BANDS, BAND / 8]: sums that a thread has all terms of."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 8, 8)), axis=3)


@triton.jit
def by_row(x: tl.tensor) -> tl.tensor:
    """[ROWS, ., .] -> [ROWS, 1, 1]"""
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)
