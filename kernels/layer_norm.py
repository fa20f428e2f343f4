"""LayerNorm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, fp32 statistics.

torch's own kernel: the towers' LayerNorms without an adapter are the only callers (with one, see norm_mma).
x [T, D] any float dtype; weight, bias [D]. Bytes: x read once, y written once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import record, wide


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D], bias [D] -> [T, D] in x's dtype, computed in fp32."""
    return F.layer_norm(wide(x), (x.shape[-1],), wide(weight), wide(bias), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the rows of x [T, D] and apply weight [D] and bias [D]; returns [T, D] in x's dtype.

    Affine parameters of another dtype than x (fp32 ones in a 16-bit tower) are applied in fp32.
    Raises ValueError where the shapes do not fit.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"layer_norm: x {tuple(x.shape)} wants weight and bias ({x.shape[-1]},), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    record("layer_norm", "torch", "the only implementation")
    if weight.dtype == x.dtype and bias.dtype == x.dtype:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)
