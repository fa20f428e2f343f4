"""Linear layers on frozen NF4 weights.

    y[t, n] = sum_k x[t, k] w[n, k] + bias[n]             dx[t, k] = sum_n dy[t, n] w[n, k]

x [..., K], y [..., N], w = dequantize_nf4(q) [N, K] in x's dtype. What is computed how, and the bytes moved, is in
kernels/frozen_linear.py. The fused product for few rows rounds otherwise than dequantize_nf4: it takes the levels in
16 bits, and a block's absmax multiplies fp32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.few_rows import set_few_rows as set_few_rows
from kernels.frozen_linear import frozen_linears
from kernels.nf4 import FusedNF4, NF4Tensor


def linear_nf4(x: Tensor, q: NF4Tensor | FusedNF4, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the stored weight [N, K] -> [..., N] in x's dtype; `bias` [N] is frozen too.

    Raises ValueError where shapes or dtypes do not fit or the bias requires a gradient.
    """
    return frozen_linears("NF4", x, (q,), (bias,))[0]


def linears_nf4(
    x: Tensor, qs: Sequence[NF4Tensor | FusedNF4], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """`linear_nf4` for weights [N_i, K] that share x (q, k, v; gate, up) -> [..., N_i] each.

    One launch for few rows; for more one that unpacks them all. The gradients of x are added up in place.
    """
    return frozen_linears("NF4", x, tuple(qs), biases)
