"""Linear layers on frozen packed weights that share x: what NF4 and int8 have in common.

    y_i[t, n] = sum_k x[t, k] w_i[n, k] + bias_i[n]             dx[t, k] = sum_i sum_n dy_i[t, n] w_i[n, k]

x [..., K], y_i [..., N_i], w_i [N_i, K] in x's dtype. Weights and biases are frozen: there is no dW, so no activation
is saved. Few rows of x (up to 64, a table by card) take the fused product of kernels/few_rows.py, once for all w_i.
More rows, and every dx: all w_i are unpacked at once into a buffer that is used again (kernels/unpacked.py), then
cuBLAS multiplies with each; the gradients of x are added up in one tensor, in place.

Traffic beyond the products: 2.516 bytes a weight of NF4, 3 of int8, each time that it is unpacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dequantize_nf4, int8, unpacked
from kernels.dispatch import record, unit_stride
from kernels.few_rows import Packed, few_rows, most_few_rows, takes, why_few_rows
from kernels.int8 import Int8Tensor

Weight = Tensor | Packed


def products(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The y_i [M, N_i] of x [M, K], without autograd. A weight that is a tensor is taken as it is."""
    packed = [w for w in weights if not isinstance(w, Tensor)]
    if packed and _fused(x, packed, len(weights)):
        return few_rows(unit_stride(x), packed, biases)
    return tuple(F.linear(x, w, bias) for w, bias in zip(_matrices(x, weights, packed), biases, strict=True))


def input_gradient(dys: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """dx [M, K] of the dy_i [M, N_i]."""
    matrices = _matrices(dys[0], weights, [w for w in weights if not isinstance(w, Tensor)])
    dx = dys[0] @ matrices[0]
    for dy, matrix in zip(dys[1:], matrices[1:], strict=True):
        dx.addmm_(dy, matrix)
    return dx


def _matrices(x: Tensor, weights: Sequence[Weight], packed: Sequence[Packed]) -> Sequence[Tensor]:
    """The weights in x's dtype; packed ones are valid until the next call, and mere shapes where x is empty."""
    if not x.shape[0]:
        return [w if isinstance(w, Tensor) else x.new_zeros(()).expand(w.shape) for w in weights]
    unpacking = iter(unpacked.weights(packed, x.dtype) if packed else ())
    return [w if isinstance(w, Tensor) else next(unpacking) for w in weights]


def _fused(x: Tensor, packed: Sequence[Packed], weights: int) -> bool:
    """Whether these products are the fused one. Decided, and said once, for few rows and for more of them."""
    kind, backend_of = (
        ("int8", int8.backend_of) if isinstance(packed[0], Int8Tensor) else ("nf4", dequantize_nf4.backend_of)
    )
    backend, most = backend_of(x), most_few_rows(x)
    few = 1 <= x.shape[0] <= most
    fused = few and backend == "cuda" and x.dtype.itemsize == 2 and len(packed) == weights and takes(packed)
    if fused:
        why = f"up to {most} rows: the fused product; {why_few_rows(x)}"
    elif few:
        why = "unpacked, then a plain product: the fused one is csrc's, for 16 bits and at most 4 weights"
    else:
        why = f"above {most} rows: unpacked once for all that share x, then plain products"
    record(f"few_rows_{kind}" if few else f"linear_{kind}", backend, why)
    return fused


class _FrozenLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        ctx.weights = weights
        return products(x, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None, None]:
        return input_gradient(dys, ctx.weights), None, None


def frozen_linears(
    name: str, x: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None] | None
) -> tuple[Tensor, ...]:
    """x [..., K] through each weight [N_i, K] of one kind -> y_i [..., N_i] in x's dtype.

    Raises ValueError, with `name` for the kind of weight, where shapes or dtypes do not fit or a bias is trained.
    """
    biases = (None,) * len(weights) if biases is None else biases
    columns = x.shape[-1]
    for q, bias in zip(weights, biases, strict=True):
        if q.shape[1] != columns:
            raise ValueError(f"x has {columns} columns, the {name} weight {tuple(q.shape)} takes {q.shape[1]}")
        if bias is not None:
            _check_bias(name, x, q, bias)
    rows = x if x.ndim == 2 else x.reshape(-1, columns)
    if x.requires_grad and torch.is_grad_enabled():
        ys = cast(tuple[Tensor, ...], _FrozenLinears.apply(rows, weights, biases))  # type: ignore[no-untyped-call]
    else:
        ys = products(rows, weights, biases)
    return ys if x.ndim == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def _check_bias(name: str, x: Tensor, q: Packed, bias: Tensor) -> None:
    if bias.requires_grad:
        raise ValueError(f"the bias of an {name} linear is frozen, got one that requires a gradient")
    if bias.shape != (q.shape[0],) or bias.dtype != x.dtype:
        raise ValueError(
            f"the bias of an {name} linear {tuple(q.shape)} is [{q.shape[0]}] in x's {x.dtype}, "
            f"got {list(bias.shape)} in {bias.dtype}"
        )
