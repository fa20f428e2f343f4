"""Head and cross-entropy of the supervised rows in one op, without a full matrix of logits.

    logits[i, v] = sum_d hidden[i, d] weight[v, d]    loss = sum_i weights_i (logsumexp(logits[i]) - logits[i, label_i])
    dlogits[i, v] = weights_i (softmax(logits[i])[v] - [v = label_i])     dhidden = dlogits W     dW = dlogits^T hidden

hidden [L, D] fp16, bf16 or fp32; weight [V, D] a tensor, NF4 or int8; labels int64 [L]; weights fp32 [L] (0 for a row
that does not count). The product runs in hidden's dtype, everything after it in fp32. The gradient is known as soon as
the loss is: it is written over the logits and multiplied out at once, so the forward holds one chunk of logits (fp32,
plus its copy in hidden's dtype), and the backward only scales. Two matrix products for a frozen head, three for a
trained one; a packed head is dequantized once a call. Nothing is computed for the backward where none can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import record
from kernels.int8 import Int8Tensor, dequantize_int8
from kernels.nf4 import NF4Tensor, dequantize_nf4

ROW_MULTIPLE = 128
SMALLEST_CHUNK = 1024  # rows; fewer make the products inefficient


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    picked = logits.gather(1, labels[:, None])[:, 0]
    return (weights * (logits.logsumexp(dim=1) - picked)).sum()


def chunk_rows(vocabulary: int, dtype: torch.dtype, memory_budget: int) -> int:
    """Rows whose logits (fp32, and the product in `dtype` where that differs) fit `memory_budget` bytes.

    A multiple of 128, at least 1,024.
    """
    logit_bytes = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    rows = memory_budget // (logit_bytes * vocabulary)
    return max(SMALLEST_CHUNK, rows // ROW_MULTIPLE * ROW_MULTIPLE)


def _loss_and_gradients(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, rows: int, need_hidden: bool, need_head: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, and the gradients divided by the returned `scale`, the largest weight.

    Relative weights keep dlogits in fp16's range whatever the loss is divided by.
    """
    fp = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=fp, device=hidden.device)
    weights = weights.to(fp)
    scale = weights.abs().amax().clamp(min=torch.finfo(fp).tiny) if weights.numel() else torch.ones_like(loss)
    dhidden = torch.empty_like(hidden) if need_hidden else None
    dhead = torch.zeros(head.shape, dtype=fp, device=head.device) if need_head else None
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        product = hidden[part] @ head.T
        logits = product.to(fp)  # [rows, V]
        target = labels[part, None]
        picked = logits.gather(1, target)
        top = logits.amax(dim=1, keepdim=True)
        total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
        loss += (weights[part, None] * (top + total.log() - picked)).sum()
        if dhidden is None and dhead is None:
            continue
        relative = weights[part, None] / scale
        logits.mul_(relative / total)
        logits.scatter_(1, target, logits.gather(1, target) - relative)
        dlogits = product.copy_(logits)
        if dhidden is not None:
            torch.mm(dlogits, head, out=dhidden[part])
        if dhead is not None:
            dhead += (dlogits.T @ hidden[part]).to(fp)
    return loss, scale, dhidden, dhead


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        need_hidden, need_head = (differentiate and need for need in ctx.needs_input_grad[:2])
        head = weight.to(hidden.dtype)
        loss, scale, dhidden, dhead = _loss_and_gradients(hidden, head, labels, weights, rows, need_hidden, need_head)
        ctx.save_for_backward(scale, dhidden, None if dhead is None else dhead.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        scale, dhidden, dhead = ctx.saved_tensors
        factor = grad * scale
        return _times(dhidden, factor), _times(dhead, factor), None, None, None, None


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * factor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | NF4Tensor | Int8Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    memory_budget: int = 256 * 2**20,
) -> Tensor:
    """sum_i weights_i CE(hidden_i W^T, labels_i), fp32 scalar (fp64 for fp64 input).

    hidden [L, D], weight [V, D], labels int64 [L] in 0..V-1, weights fp32 [L] (not differentiated); L may be 0.
    `memory_budget` bounds the bytes of logits that exist at once, as far as 1,024 rows allow.
    Raises ValueError where the shapes do not fit.
    """
    rows, (vocabulary, dim) = hidden.shape[0], weight.shape
    if hidden.ndim != 2 or hidden.shape[1] != dim or labels.shape != (rows,) or weights.shape != (rows,):
        raise ValueError(
            f"linear_cross_entropy takes hidden [L, {dim}], labels [L] and weights [L] with a head of shape "
            f"{tuple(weight.shape)}; got {tuple(hidden.shape)}, {tuple(labels.shape)} and {tuple(weights.shape)}"
        )
    record("linear_cross_entropy", "torch", "the only implementation")
    if isinstance(weight, NF4Tensor):
        weight = dequantize_nf4(weight, hidden.dtype)
    elif isinstance(weight, Int8Tensor):
        weight = dequantize_int8(weight, hidden.dtype)
    chunk = chunk_rows(vocabulary, hidden.dtype, memory_budget)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, weights, chunk, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss
