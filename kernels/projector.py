"""The projector between tower and language model: y = act(x w1^T + b1) w2^T + b2, each parameter trained or frozen.

act: gelu with erf (LLaVA's and Bunny's mlp2x_gelu, 1024-4096-4096 and 1152-2560-2560), silu (LaVIN, 1024-128-4096),
gelu_tanh, quick_gelu. x [N, K] fp16, bf16 or fp32; parameters fp32 or 16 bits, cast to x's dtype for the products; y
[N, D] in x's dtype.

The products are cuBLAS, the first one our own where that is measured to be faster (kernels/linear_act.py); what lies
between them is kernels/activation.py. Kept for the backward are x and z = x w1^T, or x alone: a = act(z + b1) is
computed again, and torch keeps x, z and a.

    forward    z [N, H] written, read, a written                              3 passes over N x H; own product: 2
    backward   da = dy w2 is overwritten by dz, a and db1 in the same pass    4 (da, z in, dz, a out)
               dw1 = dz^T x, dw2 = dy^T a straight to the parameter's dtype, db2 = sum of dy in fp32
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activation import (
    Activation,
    activation_reference,
    bias_act_backward,
    bias_act_forward,
    check_activation,
)
from kernels.dispatch import choose, wide
from kernels.linear_act import product_and_act, weight_gradient


def projector_mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """x [N, K], w1 [H, K], b1 [H], w2 [D, H], b2 [D] -> [N, D] in x's dtype."""
    hidden = activation_reference(F.linear(wide(x), wide(w1), wide(b1)), activation)
    return F.linear(hidden, wide(w2), wide(b2)).to(x.dtype)


class _ProjectorMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        activation: str, recompute: bool, own: bool | None,
    ) -> Tensor:  # fmt: skip
        needs_w1, needs_z = ctx.needs_input_grad[1], any(ctx.needs_input_grad[:4])
        keep = needs_z and not recompute
        a, z = product_and_act(x, w1.to(x.dtype), b1, activation, keep=keep, own=own)
        keep_x = needs_w1 or (needs_z and recompute)
        ctx.save_for_backward(x if keep_x else None, z if keep else None, w1, b1, w2)
        ctx.activation = activation
        return torch.addmm(b2.to(x.dtype), a, w2.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, w1, b1, w2 = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2, *_ = ctx.needs_input_grad
        if z is None and x is not None:
            z = x @ w1.to(x.dtype).T
        a = dx = dw1 = db1 = dw2 = db2 = None
        if needs_x or needs_w1 or needs_b1:
            dz = dy @ w2.to(dy.dtype)  # da, which dz is written over
            a = torch.empty_like(z) if needs_w2 else None
            db1 = bias_act_backward(dz, z, b1, dz, a, ctx.activation, needs_b1)
            dx = dz @ w1.to(dy.dtype) if needs_x else None
            dw1 = weight_gradient(dz, x, w1.dtype) if needs_w1 else None
        elif needs_w2:
            a = bias_act_forward(z, b1, ctx.activation)
        if a is not None:
            dw2 = weight_gradient(dy, a, w2.dtype)
        if needs_b2:
            db2 = dy.sum(0, dtype=torch.float32)
        return dx, dw1, db1 if needs_b1 else None, dw2, db2, None, None, None


def projector_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: Activation,
    *, recompute: bool = False, own: bool | None = None,
) -> Tensor:  # fmt: skip
    """Project x [N, K] with w1 [H, K], b1 [H], w2 [D, H], b2 [D]; returns [N, D] in x's dtype.

    Gradients for those of the five tensors that require one, the parameters' summed in fp32.
    recompute: keep x alone and repeat the first product in the backward. own: the first product by our own kernel
    (True), by cuBLAS (False), or by the faster one (None).
    Raises ValueError for an unknown activation or where the shapes do not fit.
    """
    check_activation(activation)
    h, d = w1.shape[0], w2.shape[0]
    if x.ndim != 2 or w1.shape != (h, x.shape[1]) or b1.shape != (h,) or w2.shape != (d, h) or b2.shape != (d,):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (x, w1, b1, w2, b2))
        raise ValueError(f"projector_mlp takes x [N, K], w1 [H, K], b1 [H], w2 [D, H], b2 [D]; got {got}")
    if choose("projector_mlp", x, ("triton", "reference")) == "reference":
        return projector_mlp_reference(x, w1, b1, w2, b2, activation)
    y = _ProjectorMLP.apply(x, w1, b1.contiguous(), w2, b2, activation, recompute, own)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)
