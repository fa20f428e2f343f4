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
    cols: int  # channels of a tile
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


@dataclass(frozen=True, slots=True)
class Products:
    """Products x w^T, x [M, K], w [N, K], on some cards: (least, most) of each size."""

    cards: tuple[int, ...]
    m: tuple[int, int]
    k: tuple[int, int]
    n: tuple[int, int]


# 16-bit products with an activation that linear_act computes faster than cuBLAS and bias_act do, as measured by
# python -m benchmarks.projector; all others are cuBLAS.
OWN_PRODUCTS: tuple[Products, ...] = ()

# Up to how many rows of x a product with a packed weight is the fused one (kernels/few_rows.py), by card; with more the
# weight is unpacked once and cuBLAS multiplies. Predictions, none measured. Unpacking NF4 moves 2.5 bytes a weight and
# the product behind it 2, the fused product 0.5 in all: as long as memory bounds both, the fused one is up to nine
# times faster. With more rows its arithmetic bounds it (decoding, and tensor cores fed without cuBLAS's pipeline). The
# fused product of bitsandbytes 0.50 is chosen up to 16 to 128 rows on sm_86, by size, 32 to 128 on sm_80, 32 to 64 on
# sm_90 and 256 on sm_89 and sm_120: 64, the most that ours takes, lies within or below these.
MOST_FEW_ROWS = 64  # csrc/nibble.h: NIBBLE_MAX_TOKENS
FEW_ROWS: dict[int, int] = {80: 64, 86: 64, 89: 64, 90: 64, 120: 64}

# Streaming multiprocessors of a card of this compute capability, where none is here to be asked: A100, RTX 3090,
# RTX 4090, H100 and H200, RTX 5090 (NVIDIA's data sheets).
PROCESSORS: dict[int, int] = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}

# What a kernel's time goes into besides its traffic: products on tensor cores. In all others a register spill is an
# error of the configuration (python -m kernels.compile).
COMPUTE_BOUND: set[str] = {
    "lora_down",
    "lora_outer",
    "lora_update",
    "attention_dkdv",
    "attention_dq",
    "attention_forward",
    "linear_act",
    "norm_mma_dadapter",
}

# Rows held in registers, in tiles of 8 elements a thread. Sizes are channels of 16 bits: those of fp32 count twice.
WHOLE_ROWS = (
    Choice(128, Launch(rows=16, cols=128, warps=4)),
    Choice(1280, Launch(rows=4, cols=256, warps=4)),  # a warp has a row to itself
    Choice(2560, Launch(rows=2, cols=512, warps=4)),
    Choice(5120, Launch(rows=1, cols=1024, warps=4)),
    Choice(8192, Launch(rows=1, cols=2048, warps=8)),
    Choice(16384, Launch(rows=1, cols=4096, warps=16)),
    Choice(24576, Launch(rows=1, cols=8192, warps=16)),  # 3 tiles of 4096 spill on sm_90
    Choice(32768, Launch(rows=1, cols=4096, warps=16)),
)

LAUNCHES: dict[str, tuple[Choice, ...]] = {
    "norm_forward": WHOLE_ROWS,
    "norm_backward": WHOLE_ROWS,
    "norm_daffine": (
        Choice(1536, Launch(rows=16, cols=128, warps=4, chunk=64)),
        Choice(ANY, Launch(rows=16, cols=128, warps=4, chunk=128)),
    ),
    # norm_mma: the last choice of a kernel is that of fp32 rows, of any width, whose products have no tensor cores.
    "norm_mma_pack": (Choice(ANY, Launch(rows=1, cols=2048, warps=8)),),
    "norm_mma_forward": (  # tiles are twice as wide without delta
        Choice(128, Launch(rows=16, cols=128, warps=8)),
        Choice(1 << 20, Launch(rows=16, cols=256, warps=8), cards=(80, 86, 89)),
        Choice(1 << 20, Launch(rows=16, cols=512, warps=16)),
        Choice(ANY, Launch(rows=16, cols=128, warps=8)),
    ),
    "norm_mma_backward": (
        Choice(128, Launch(rows=16, cols=128, warps=4)),
        Choice(1 << 20, Launch(rows=16, cols=256, warps=8), cards=(80, 86, 89)),
        Choice(1 << 20, Launch(rows=16, cols=512, warps=16)),
        Choice(ANY, Launch(rows=16, cols=128, warps=8)),
    ),
    "norm_mma_dadapter": (
        Choice(1 << 20, Launch(rows=64, cols=128, warps=4, chunk=128, stages=3)),
        Choice(ANY, Launch(rows=32, cols=128, warps=8, chunk=128)),
    ),
    "norm_mma_dmix": (Choice(ANY, Launch(rows=4096, cols=1, warps=8)),),
    "rope_turn": (  # channels that turn in a token of q or of k, the larger
        Choice(1024, Launch(rows=1, cols=1024, warps=2)),
        Choice(2048, Launch(rows=1, cols=2048, warps=4)),
        Choice(ANY, Launch(rows=1, cols=4096, warps=4)),
    ),
    "lora_down": (  # size: bytes that one channel of all A takes; cols: channels that one program sums over
        Choice(256, Launch(rows=32, cols=1024, warps=4, inner=64)),
        Choice(768, Launch(rows=64, cols=1024, warps=8, inner=32)),
        Choice(1536, Launch(rows=32, cols=1024, warps=8, inner=32)),
        Choice(ANY, Launch(rows=16, cols=1024, warps=8, inner=16)),  # fp32 beyond rank 128
    ),
    "lora_update": (
        Choice(96, Launch(rows=64, cols=64, warps=8, inner=16)),
        Choice(ANY, Launch(rows=64, cols=64, warps=8, inner=64)),
    ),
    "lora_outer": (
        Choice(64, Launch(rows=64, cols=64, warps=4, chunk=256)),
        Choice(256, Launch(rows=32, cols=64, warps=4, chunk=512)),
        Choice(768, Launch(rows=32, cols=64, warps=8, chunk=1024)),
        Choice(1536, Launch(rows=32, cols=32, warps=8, chunk=1024)),
        Choice(ANY, Launch(rows=16, cols=16, warps=8, chunk=1024)),  # fp32 beyond rank 128
    ),
    "bias_act_forward": (Choice(ANY, Launch(rows=8, cols=256, warps=4)),),
    "bias_act_backward": (  # size: tokens
        Choice(4096, Launch(rows=4, cols=256, warps=4, chunk=32)),
        Choice(ANY, Launch(rows=4, cols=256, warps=4, chunk=64)),
    ),
    "linear_act": (  # size: tiles of 128 x 256; 0 for fp32
        Choice(0, Launch(rows=64, cols=64, warps=8, inner=32)),
        Choice(132, Launch(rows=64, cols=128, warps=4, inner=64, stages=4), cards=(80, 90)),
        Choice(132, Launch(rows=64, cols=128, warps=4, inner=32, stages=3)),
        Choice(ANY, Launch(rows=128, cols=256, warps=8, inner=64, stages=4), cards=(80, 90)),
        Choice(ANY, Launch(rows=128, cols=128, warps=4, inner=32, stages=4)),
    ),
    "dropped_sum_forward": (  # size: channels of a row; all elements where they are one row
        Choice(1 << 16, Launch(rows=2, cols=512, warps=4)),
        Choice(ANY, Launch(rows=1, cols=1024, warps=4)),
    ),
    "dropped_sum_backward": (
        Choice(1 << 16, Launch(rows=2, cols=512, warps=4)),
        Choice(ANY, Launch(rows=1, cols=1024, warps=4)),
    ),
    "swiglu_forward": (  # size: channels of a row; all elements where they are one row
        Choice(1 << 16, Launch(rows=4, cols=512, warps=4)),
        Choice(1 << 23, Launch(rows=1, cols=1024, warps=4)),
        Choice(ANY, Launch(rows=1, cols=2048, warps=4)),
    ),
    "swiglu_backward": (
        Choice(1 << 16, Launch(rows=4, cols=512, warps=4)),
        Choice(1 << 23, Launch(rows=1, cols=1024, warps=4)),
        Choice(ANY, Launch(rows=1, cols=2048, warps=4)),
    ),
    "adamw_squares": (Choice(ANY, Launch(rows=1, cols=4096, warps=4)),),
    "adamw_decide": (Choice(ANY, Launch(rows=1, cols=4096, warps=8)),),
    "adamw_update": (Choice(ANY, Launch(rows=1, cols=1024, warps=4)),),
    "cross_entropy_rows": (
        Choice(4096, Launch(rows=1, cols=2048, warps=4)),
        Choice(65536, Launch(rows=1, cols=8192, warps=16)),
        Choice(ANY, Launch(rows=1, cols=16384, warps=32)),  # one wide row an SM: all of them fit the L2 cache
    ),
    "scale_gradient": (Choice(ANY, Launch(rows=1, cols=2048, warps=4)),),
    "decode_attention": (  # size: the channels of a head, for fp32 plus 128
        Choice(64, Launch(rows=128, cols=64, warps=4)),
        Choice(127, Launch(rows=64, cols=128, warps=8)),  # masked channels: 128 rows spill
        Choice(128, Launch(rows=128, cols=128, warps=8)),
        Choice(ANY, Launch(rows=32, cols=128, warps=8)),
    ),
    # attention_*: size is the channels of a head, for fp32 plus 128 (products without tensor cores)
    "attention_forward": (
        Choice(32, Launch(rows=64, cols=32, warps=4, inner=64, stages=3)),
        Choice(64, Launch(rows=64, cols=64, warps=4, inner=64, stages=3)),
        Choice(96, Launch(rows=64, cols=64, warps=4, inner=64, stages=3), cards=(90,)),
        Choice(96, Launch(rows=64, cols=64, warps=4, inner=32, stages=3)),
        Choice(128, Launch(rows=64, cols=128, warps=4, inner=64, stages=3), cards=(90,)),
        Choice(128, Launch(rows=64, cols=128, warps=4, inner=32, stages=3), cards=(80,)),
        Choice(128, Launch(rows=64, cols=128, warps=4, inner=32)),
        Choice(160, Launch(rows=32, cols=32, warps=8, inner=16)),
        Choice(224, Launch(rows=32, cols=64, warps=8, inner=16)),
        Choice(256, Launch(rows=32, cols=128, warps=8, inner=16)),
    ),
    "attention_dq": (
        Choice(32, Launch(rows=64, cols=32, warps=4, inner=64, stages=3)),
        Choice(64, Launch(rows=64, cols=64, warps=4, inner=64, stages=3), cards=(90,)),
        Choice(96, Launch(rows=64, cols=64, warps=4, inner=32, stages=3)),
        Choice(128, Launch(rows=64, cols=128, warps=4, inner=32, stages=3), cards=(80, 90)),
        Choice(128, Launch(rows=64, cols=128, warps=8, inner=32, stages=3)),
        Choice(160, Launch(rows=32, cols=32, warps=8, inner=16)),
        Choice(224, Launch(rows=32, cols=64, warps=8, inner=16)),
        Choice(256, Launch(rows=32, cols=128, warps=8, inner=16)),
    ),
    "attention_dkdv": (
        Choice(32, Launch(rows=64, cols=32, warps=4, inner=32, stages=3)),
        Choice(96, Launch(rows=64, cols=64, warps=4, inner=32, stages=3)),
        Choice(128, Launch(rows=64, cols=128, warps=4, inner=32, stages=3), cards=(80, 90)),
        Choice(128, Launch(rows=64, cols=128, warps=8, inner=32, stages=3)),
        Choice(160, Launch(rows=32, cols=32, warps=8, inner=16)),
        Choice(224, Launch(rows=32, cols=64, warps=8, inner=16)),
        Choice(256, Launch(rows=32, cols=128, warps=8, inner=16)),
    ),
}
