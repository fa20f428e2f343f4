"""Launch configurations of every kernel: the one place to tune.

A kernel's choices are tried in order; the first whose `largest` is not below the size that the launcher asks for (a
row's channels, unless the launcher says otherwise) and whose `cards` has the card holds. Cards are compute
capabilities, 86 for an RTX 3090; a choice without cards holds for all, and one must come last.
"""

from __future__ import annotations

from dataclasses import dataclass

ANY = 1 << 30  # no limit


@dataclass(frozen=True, slots=True)
class Launch:
    """One configuration. A kernel's constants ROWS, COLS, INNER and CHUNK, where it has them, are these fields."""

    rows: int  # tokens of a tile
    cols: int  # channels of a tile; kernels that hold whole rows need a power of two >= the channel count
    warps: int
    inner: int = 0  # step of the loop over a product's inner dimension
    chunk: int = 0  # tokens that one program sums over, a multiple of rows (kernels that reduce over tokens)
    stages: int = 2  # of the software pipeline


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration and the sizes and cards it is for."""

    largest: int
    launch: Launch
    cards: tuple[int, ...] = ()


# What a kernel's time goes into besides its traffic: products on tensor cores. In all others a register spill is an
# error of the configuration (python -m kernels.compile).
COMPUTE_BOUND: set[str] = {
    "norm_mma_dadapter",
}

LAUNCHES: dict[str, tuple[Choice, ...]] = {
    "rms_norm_forward": (
        Choice(128, Launch(rows=16, cols=128, warps=4)),
        Choice(1024, Launch(rows=4, cols=1024, warps=4)),
        Choice(4096, Launch(rows=1, cols=4096, warps=8)),
        Choice(8192, Launch(rows=1, cols=8192, warps=8)),
        Choice(16384, Launch(rows=1, cols=16384, warps=16)),
    ),
    "rms_norm_backward": (
        Choice(128, Launch(rows=16, cols=128, warps=4)),
        Choice(1024, Launch(rows=4, cols=1024, warps=4)),
        Choice(4096, Launch(rows=1, cols=4096, warps=8)),
        Choice(8192, Launch(rows=1, cols=8192, warps=16)),
        Choice(16384, Launch(rows=1, cols=16384, warps=16)),
    ),
    "rms_norm_dweight": (Choice(ANY, Launch(rows=32, cols=128, warps=4, chunk=256)),),
    "norm_mma_forward": (
        Choice(64, Launch(rows=16, cols=64, warps=4)),
        Choice(ANY, Launch(rows=16, cols=128, warps=4)),
    ),
    "norm_mma_backward": (
        Choice(64, Launch(rows=16, cols=64, warps=4)),
        Choice(ANY, Launch(rows=16, cols=128, warps=4)),
    ),
    "norm_mma_dadapter": (
        Choice(64, Launch(rows=32, cols=64, warps=4, chunk=256)),
        Choice(ANY, Launch(rows=32, cols=128, warps=4, chunk=256)),
    ),
    "norm_mma_dmix": (Choice(ANY, Launch(rows=512, cols=16, warps=4)),),  # cols: router rows
    "bias_act_forward": (Choice(ANY, Launch(rows=16, cols=128, warps=4)),),
    "bias_act_backward": (Choice(ANY, Launch(rows=16, cols=128, warps=4, chunk=64)),),
}
