"""SwiGLU: h = silu(gate) * up, with silu(g) = g * sigmoid(g) (GLU variants, arXiv 2002.05202).

    dup = dh * silu(gate)        dgate = dh * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

gate, up, h [T, F] in one dtype; maths in fp32. The backward recomputes silu, so only gate and up are saved (torch's
expression also saves silu(gate)): 2 reads and 1 write forward, 3 reads and 2 writes backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import record, wide


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_reference(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate32, grad32 = wide(gate), wide(grad)
        sigmoid = torch.sigmoid(gate32)
        dup = grad32 * gate32 * sigmoid
        dgate = grad32 * wide(up) * sigmoid * (1.0 + gate32 * (1.0 - sigmoid))
        return dgate.to(gate.dtype), dup.to(up.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate, up [T, F] of one shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must agree in shape and dtype, got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}"
        )
    record("swiglu", "torch", "the only implementation")
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out
