"""Linear layers on frozen row-wise int8 weights.

    y[t, n] = sum_k x[t, k] w[n, k] + bias[n]             dx[t, k] = sum_n dy[t, n] w[n, k]

x [..., K], y [..., N], w = dequantize_int8(q) [N, K] in x's dtype. What is computed how, and the bytes moved, is in
kernels/frozen_linear.py. The fused product for few rows rounds otherwise than dequantize_int8: codes are exact
in 16 bits, and a row's scale multiplies fp32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.frozen_linear import frozen_linears
from kernels.int8 import Int8Tensor


def linear_int8(x: Tensor, q: Int8Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the stored weight [N, K] -> [..., N] in x's dtype; `bias` [N] is frozen too.

    Raises ValueError where shapes or dtypes do not fit or the bias requires a gradient.
    """
    return frozen_linears("int8", x, (q,), (bias,))[0]


def linears_int8(
    x: Tensor, qs: Sequence[Int8Tensor], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """`linear_int8` for weights [N_i, K] that share x (q, k, v; gate, up) -> [..., N_i] each."""
    return frozen_linears("int8", x, tuple(qs), biases)
