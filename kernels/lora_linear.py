"""Linear layer on a frozen weight with a trained update of low rank (LoRA, arXiv 2106.09685); saves x and nothing else.

    y  = x W^T + bias + s h B^T      h  = drop(x) A^T               g  = s dY B
    dX = dY W + drop(g A)            dA = g^T drop(x)               dB = s dY^T h        drop: the same mask throughout

x [T, K], y [T, N] and W [N, K] in one dtype, or W in 8 or 4 bits; A [r, K], B [N, r] in fp32 or x's dtype. Layers that
share x (q, k, v; gate, up) go in one call: their A are one matrix [n r, K], x is read once for all h and once for all
dA, and the gradients of x are added up in one tensor, in place. Each layer has a mask of its own.

Dropout is the counter hash of kernels/dropout.py on x's elements, so no mask is kept: each product makes its own. h is
computed again in the backward pass; x W^T and dY W with a packed W are those of kernels/frozen_linear.py. Operands of
products have x's dtype, sums are fp32; dA and dB are fp32 partial sums over fixed chunks of tokens, added in order and
cast last.

    x W^T, dY W, h B^T, dY B    cuBLAS, in place where something is added to: plain products, whose roof it is
    x A^T, g A                  cuBLAS without dropout: one plain product for all n layers. With it:
    lora_down     drop(x) A^T. Reads x and A, writes h; more than 1,024 channels go through fp32 partial sums, so that a
                  short pack fills the card too
    lora_update   dX += drop(g A). Reads and writes dX, reads g and A; no [T, K] beside it
    lora_outer    dA, and dB from dY and h. Reads x (dY) and g (h), writes [n r, K] in fp32, once a chunk of 256 to
                  1,024 tokens
    The last two read g again for each 16 to 64 channels, but in neighbouring programs: from the L2 cache.

Prediction: with dropout the hash (some 24 integer instructions an element and layer) outweighs the bytes on an H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import lora_linear_kernels
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.dispatch import choose, launch, primitive, run, unit_stride, wide
from kernels.dropout import keep_mask, threshold
from kernels.frozen_linear import Weight, input_gradient, products
from kernels.int8 import Int8Tensor, dequantize_int8

LARGEST_GROUP, LARGEST_RANK = 3, 256


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The frozen weight [N, K], unpacked where it is packed, in memory of its own."""
    if isinstance(weight, Tensor):
        return weight
    return dequantize_int8(weight, dtype) if isinstance(weight, Int8Tensor) else dequantize_nf4(weight, dtype)


def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Plain torch; shapes as in `lora_linear`."""
    x32 = dropped = wide(x)
    if dropout > 0.0 and seed is not None:
        dropped = x32 * keep_mask(seed, site, x.shape[0], x.shape[1], dropout, x.device) / (1.0 - dropout)
    base = F.linear(x32, wide(dense(weight, x.dtype)), None if bias is None else wide(bias))
    return (base + scaling * (dropped @ wide(a).T) @ wide(b).T).to(x.dtype)


def _sizes(adapters: int, code: int, x: Tensor) -> tuple[int, dict[str, Any]]:
    """What a configuration goes by, the bytes of one channel of all A (code = n r rows), and compile-time arguments."""
    rank = code // adapters
    padded = max(16, triton.next_power_of_2(rank))
    constants = {"RANK": rank, "PADDED": padded, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}
    return adapters * padded * x.element_size(), {"ADAPTERS": adapters, **constants}


def _down_outputs(x: Tensor, a: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@primitive(
    "lora_down(Tensor x, Tensor a, int adapters, float dropout, Tensor seed, int site) -> Tensor", fake=_down_outputs
)
def lora_down(x: Tensor, a: Tensor, adapters: int, dropout: float, seed: Tensor, site: int) -> Tensor:
    """x [T, K] with unit last stride, a [n r, K] contiguous, of one dtype -> the codes h [T, n r]."""
    (tokens, channels), code = x.shape, a.shape[0]
    size, constants = _sizes(adapters, code, x)
    config = launch("lora_down", size, x)
    parts = triton.cdiv(channels, config.cols)
    partial = x.new_empty(parts, tokens, code, dtype=x.dtype if parts == 1 else torch.float32)
    run(
        lora_linear_kernels.lora_down_kernel, (triton.cdiv(tokens, config.rows), parts), config,
        x, a, seed, partial, x.stride(0), tokens, channels, site, threshold(dropout), 1.0 / (1.0 - dropout),
        **constants,
    )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0).to(x.dtype)


@primitive(
    "lora_update_(Tensor(a!) dx, Tensor g, Tensor a, int adapters, float dropout, Tensor seed, int site) -> ()",
    fake=lambda *_: None,
)
def lora_update_(dx: Tensor, g: Tensor, a: Tensor, adapters: int, dropout: float, seed: Tensor, site: int) -> None:
    """dx [T, K] with unit last stride, g [T, n r] and a [n r, K] contiguous, of one dtype."""
    tokens, channels = dx.shape
    size, constants = _sizes(adapters, a.shape[0], dx)
    config = launch("lora_update", size, dx)
    config = replace(config, inner=min(config.inner, constants["PADDED"]))
    run(
        lora_linear_kernels.lora_update_kernel,
        (triton.cdiv(channels, config.cols), triton.cdiv(tokens, config.rows)), config,
        dx, g, a, seed, dx.stride(0), tokens, channels, site, threshold(dropout), 1.0 / (1.0 - dropout),
        **constants,
    )  # fmt: skip


def _outer_outputs(code: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(code.shape[1], x.shape[1], dtype=torch.float32)


@primitive(
    "lora_outer(Tensor code, Tensor x, int adapters, float dropout, Tensor? seed, int site, float scale=1.0) -> Tensor",
    fake=_outer_outputs,
)
def lora_outer(
    code: Tensor, x: Tensor, adapters: int, dropout: float, seed: Tensor | None, site: int, scale: float = 1.0
) -> Tensor:
    """code [T, n r], x [T, K] with unit last strides, of one dtype -> scale code^T drop(x) [n r, K] fp32; seed None:
    of x itself."""
    (tokens, channels), width = x.shape, code.shape[1]
    size, constants = _sizes(adapters, width, x)
    config = launch("lora_outer", size, x)
    chunks = triton.cdiv(tokens, config.chunk)
    partial = x.new_empty(chunks, width, channels, dtype=torch.float32)
    run(
        lora_linear_kernels.lora_outer_kernel, (triton.cdiv(channels, config.cols), chunks), config,
        code, x, seed, partial, code.stride(0), x.stride(0), tokens, channels, site,
        threshold(dropout), scale if seed is None else scale / (1.0 - dropout), **constants,
    )  # fmt: skip
    return partial[0] if chunks == 1 else partial.sum(0)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        weights: Sequence[Weight],
        biases: Sequence[Tensor | None],
        scaling: float,
        dropout: float,
        site: int,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, seed, *adapters)
        ctx.weights, ctx.options = weights, (scaling, dropout, site)
        a, ups = _narrowed(adapters[: len(weights)], adapters[len(weights) :], x)
        codes = _codes(x, a, len(weights), dropout, seed, site)
        ys = products(x, weights, biases)
        return tuple(y.addmm_(h, up.T, alpha=scaling) for y, up, h in zip(ys, ups, codes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, seed, *adapters = ctx.saved_tensors
        n, (scaling, dropout, site) = len(ctx.weights), ctx.options
        needs = tuple(any(ctx.needs_input_grad[i:j]) for i, j in ((0, 1), (7, 7 + n), (7 + n, None)))
        dx, da, db = _gradients(
            x, dys, ctx.weights, adapters[:n], adapters[n:], seed, scaling, dropout, site, needs
        )  # fmt: skip
        return dx, None, None, None, None, None, None, *da, *db


def _gradients(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Weight], downs: Sequence[Tensor], ups: Sequence[Tensor],
    seed: Tensor | None, scaling: float, dropout: float, site: int, needs: tuple[bool, ...],
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
    """dx [T, K], the layers' dA and their dB, those of the three that `needs` says."""
    n, (a, narrow) = len(weights), _narrowed(downs, ups, x)
    dys = tuple(unit_stride(dy) for dy in dys)
    g = x.new_empty(x.shape[0], a.shape[0])
    for part, dy, up in zip(g.chunk(n, dim=1), dys, narrow, strict=True):
        part.addmm_(dy, up, beta=0, alpha=scaling)
    dx: Tensor | None = None
    if needs[0]:
        dx = input_gradient(dys, weights)
        if seed is None:
            dx.addmm_(g, a)
        else:
            lora_update_(dx, g, a, n, dropout, seed, site)
    da: Sequence[Tensor | None] = [None] * n
    if needs[1]:
        da = [part.to(downs[0].dtype) for part in lora_outer(g, x, n, dropout, seed, site).chunk(n)]
    db: Sequence[Tensor | None] = [None] * n
    if needs[2]:
        codes = _codes(x, a, n, dropout, seed, site)
        outer = [lora_outer(h, dy, 1, 0.0, None, 0, scaling) for h, dy in zip(codes, dys, strict=True)]  # [r, N_i] each
        db = [each.T.to(up.dtype) for each, up in zip(outer, ups, strict=True)]
    return dx, da, db


def _narrowed(a: Sequence[Tensor], b: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """All A as one matrix [n r, K] and the B [N, r], in x's dtype: one launch for a group, not one a matrix."""
    stacked = x.new_empty(sum(each.shape[0] for each in a), x.shape[1])
    targets, ups = list(stacked.chunk(len(a))), b
    if any(each.dtype != x.dtype for each in b):
        ups = [x.new_empty(each.shape) for each in b]
        targets += ups
    torch._foreach_copy_(targets, [*a, *b][: len(targets)])
    return stacked, ups


def _codes(x: Tensor, a: Tensor, adapters: int, dropout: float, seed: Tensor | None, site: int) -> tuple[Tensor, ...]:
    """Each layer's h [T, r]."""
    h = x @ a.T if seed is None else lora_down(x, a, adapters, dropout, seed, site)
    return h.chunk(adapters, dim=1)


def lora_linears(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, ...]:
    """`lora_linear` for up to three layers on one x: q, k, v, or gate, up. Layer i has the mask of site + i.

    The N_i may differ, the rank may not. Returns the layers' y [T, N_i].
    """
    _check(x, weights, biases, a, b, dropout)
    active = seed if dropout > 0.0 else None
    if choose("lora_linear", x, ("triton", "reference")) == "reference":
        layers = zip(weights, biases, a, b, strict=True)
        return tuple(
            lora_linear_reference(x, *layer, scaling, dropout, active, site + i) for i, layer in enumerate(layers)
        )
    ys = _LoraLinears.apply(  # type: ignore[no-untyped-call]
        unit_stride(x), active, weights, biases, scaling, dropout, site, *a, *b
    )
    return cast(tuple[Tensor, ...], ys)


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """x [T, K] through the frozen weight [N, K] and bias [N], plus scaling * (drop(x) a^T) b^T; returns [T, N].

    weight in x's dtype, NF4 or int8; bias in x's dtype; a [r, K] and b [N, r], r <= 256, in fp32 or x's dtype, as are
    their gradients. Where a seed (int64 [1], on x's device) is given, x is dropped out with probability `dropout`;
    `site` tells this dropout from the model's others.
    Raises ValueError where shapes or dtypes do not fit, or where weight or bias require a gradient.
    """
    return lora_linears(
        x, (weight,), (bias,), (a,), (b,), scaling=scaling, dropout=dropout, seed=seed, site=site
    )[0]  # fmt: skip


def lora_linear_gradients(
    x: Tensor, dy: Tensor, weight: Weight, a: Tensor, b: Tensor, *, scaling: float, dropout: float = 0.0,
    seed: Tensor | None = None, site: int = 0, needs_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """`lora_linear`'s gradients of x (None unless `needs_x`), a and b from that of y [T, N], without computing y: for
    a layer whose forward pass is not to run again. The same bits as its own backward; not differentiable."""
    active = seed if dropout > 0.0 else None
    if choose("lora_linear", x, ("triton", "reference")) == "reference":
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        with torch.enable_grad():
            y = lora_linear_reference(leaves[0], weight, None, leaves[1], leaves[2], scaling, dropout, active, site)
        dx, da, db = torch.autograd.grad(y, leaves, dy)
        return dx if needs_x else None, da, db
    with torch.no_grad():
        found, (da_or_none,), (db_or_none,) = _gradients(
            unit_stride(x), (dy,), (weight,), (a,), (b,), active, scaling, dropout, site, (needs_x, True, True)
        )
    return found, cast(Tensor, da_or_none), cast(Tensor, db_or_none)


def _check(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    dropout: float,
) -> None:
    threshold(dropout)  # its range
    if not 1 <= len(weights) <= LARGEST_GROUP or any(len(each) != len(weights) for each in (biases, a, b)):
        counts = [len(each) for each in (weights, biases, a, b)]
        raise ValueError(f"lora_linears takes 1 to {LARGEST_GROUP} layers, got {counts} weights, biases, a and b")
    rank = a[0].shape[0]
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"lora_linear takes ranks from 1 to {LARGEST_RANK}, got {rank}")
    for weight, bias, down, up in zip(weights, biases, a, b, strict=True):
        n, k = weight.shape
        if x.ndim != 2 or x.shape[1] != k or down.shape != (rank, k) or up.shape != (n, rank):
            raise ValueError(
                f"lora_linear takes x [T, K], weight [N, K], a [r, K], b [N, r]; "
                f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(down.shape)}, {tuple(up.shape)}"
            )
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"lora_linear: bias must be ({n},), got {tuple(bias.shape)}")
        frozen = [each for each in (weight, bias) if isinstance(each, Tensor)]
        if any(each.dtype != x.dtype for each in frozen):
            raise ValueError(f"lora_linear: weight and bias must be {x.dtype}, got {[str(t.dtype) for t in frozen]}")
        if torch.is_grad_enabled() and any(each.requires_grad for each in frozen):
            raise ValueError("lora_linear keeps weight and bias frozen, but one of them requires a gradient")
