"""The logarithm for kernels that must not call libdevice, which tl.log and tl.log2 do."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def logarithm(x: tl.tensor) -> tl.tensor:
    """Of fp32 >= 1, to two ulps (tl.log is libdevice's): x = 2^k m with m from sqrt(1/2) to sqrt(2), s = (m-1) / (m+1),
    and log(x) = k log(2) + 2 s (1 + s^2/3 + s^4/5 + ...)."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9))))
    return tl.where(x == x, k * 0.6931471805599453 + 2.0 * s * series, x)
