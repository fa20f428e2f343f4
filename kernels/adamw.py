"""AdamW over one flat buffer: unscale, finite check, clip to a global norm, update, copy-out and zero-grad, no waiting.

    g       = grad * inv_scale                    norm = sqrt(sum(g^2))
    g       = g * min(1, max_norm / (norm + 1e-6))                                   as torch.nn.utils.clip_grad_norm_
    exp_avg = exp_avg + (1 - beta1) (g - exp_avg)       exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    param   = param (1 - lr weight_decay) - lr / c1 * exp_avg / (sqrt(exp_avg_sq / c2) + eps),   c = 1 - beta^step

as torch.optim.AdamW (arXiv 1711.05101). param, exp_avg, exp_avg_sq fp32 [N]; grad [N] fp16, bf16 or fp32; step, lr,
inv_scale fp32 [1] on the device, so that the host never waits and the whole can be captured in a graph. The first
`decayed` elements have weight decay. Where the norm or `guard` (the loss) is not finite nothing changes at all, the
gradient included: it can still be asked which tensor went wrong.

    squares   sums of squares over fixed chunks of the gradient, added in a fixed order: repeatable     4 B an element
    decide    norm, finite, factors of this step (one program)
    update    reads param, grad, exp_avg, exp_avg_sq and writes all of them (the gradient: zeros)      32 B an element

The gradient is read twice, since its norm comes first: 36 B in all, where a step that does not clip could do with 32.
The update's other inputs pass with evict_first, so that a gradient that fits the L2 cache is still there to be read
again. torch has GradScaler, clip_grad_norm_, AdamW, a copy and zero_grad for this, each with passes of its own.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import choose, launch, primitive, run, wide

NORM_EPS = 1e-6  # of clip_grad_norm_
TERMS = 5  # what `decide` hands to `update`: live, factor of the gradient, step size, 1 / sqrt(c2), shrinkage


def adamw_reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, inv_scale: Tensor, *,
    decayed: int, beta1: float, beta2: float, eps: float, weight_decay: float, max_norm: float | None = None,
    guard: Tensor | None = None, copy: Tensor | None = None, squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `adamw`, which has the arguments. A step that is not finite is one with weights of zero."""
    norm = (sum_squares_reference(grad, inv_scale) if squares is None else squares).sum().sqrt()
    finite = norm.isfinite() if guard is None else norm.isfinite() & guard.isfinite()
    live = finite.to(param.dtype)
    factor = inv_scale * (_or_infinity(max_norm) / (norm + NORM_EPS)).clamp(max=1.0)
    g = (wide(grad) * factor).masked_fill_(~finite, 0.0)
    c1, c2 = (-torch.expm1((step + 1.0) * _log(beta)) for beta in (beta1, beta2))
    exp_avg.lerp_(g, (1.0 - beta1) * live)
    exp_avg_sq.lerp_(g.square_(), (1.0 - beta2) * live)
    param[:decayed] *= 1.0 - live * lr * weight_decay
    param.addcdiv_(exp_avg * (live * lr / -c1), (exp_avg_sq / c2).sqrt_().add_(eps))
    if copy is not None:
        copy.copy_(param)
    grad.masked_fill_(finite, 0.0)
    step += live
    return norm


def sum_squares_reference(grad: Tensor, inv_scale: Tensor) -> Tensor:
    """grad [N], inv_scale [1] -> [1]."""
    return (wide(grad) * inv_scale).square_().sum().view(1)


@triton.jit
def adamw_squares_kernel(
    grad_ptr: tl.tensor, inv_scale_ptr: tl.tensor, squares_ptr: tl.tensor, size: tl.tensor, COLS: tl.constexpr
) -> None:
    """One program: the sum over COLS elements."""
    at = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    grad = tl.load(grad_ptr + at, mask=at < size, other=0.0).to(tl.float32) * tl.load(inv_scale_ptr)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(grad * grad))


@triton.jit
def bias_correction(step: tl.tensor, log_beta: tl.tensor) -> tl.tensor:
    """1 - beta^step to a few ulp: where beta^step is near 1 the difference would cancel, and the series of exp does."""
    x = step * log_beta
    series = 1.0
    for k in tl.static_range(8, 1, -1):
        series = 1.0 + series * x / k
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def adamw_decide_kernel(
    squares_ptr: tl.tensor,
    step_ptr: tl.tensor,
    lr_ptr: tl.tensor,
    inv_scale_ptr: tl.tensor,
    guard_ptr: tl.tensor | None,
    norm_ptr: tl.tensor,
    terms_ptr: tl.tensor,
    chunks: tl.tensor,
    log_beta1: tl.tensor,
    log_beta2: tl.tensor,
    weight_decay: tl.tensor,
    max_norm: tl.tensor,
    norm_eps: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    """One program in all."""
    cols = tl.arange(0, COLS)
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, chunks, COLS):
        total += tl.load(squares_ptr + start + cols, mask=start + cols < chunks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total))
    finite = norm < float("inf")  # False for NaN
    if guard_ptr is not None:
        finite = finite & (tl.abs(tl.load(guard_ptr)) < float("inf"))
    step = tl.load(step_ptr) + 1.0
    lr = tl.load(lr_ptr)
    tl.store(norm_ptr, norm)
    tl.store(step_ptr, step, mask=finite)
    tl.store(terms_ptr, finite.to(tl.float32))
    tl.store(terms_ptr + 1, tl.load(inv_scale_ptr) * tl.minimum(max_norm / (norm + norm_eps), 1.0))
    tl.store(terms_ptr + 2, lr / bias_correction(step, log_beta1))
    tl.store(terms_ptr + 3, 1.0 / tl.sqrt_rn(bias_correction(step, log_beta2)))
    tl.store(terms_ptr + 4, 1.0 - lr * weight_decay)


@triton.jit
def adamw_update_kernel(
    param_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    exp_avg_ptr: tl.tensor,
    exp_avg_sq_ptr: tl.tensor,
    copy_ptr: tl.tensor | None,
    terms_ptr: tl.tensor,
    size: tl.tensor,
    decayed: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    """One program: COLS elements. rest = 1 - beta."""
    at = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = at < size
    grad_raw = tl.load(grad_ptr + at, mask=inside, other=0.0)
    param = tl.load(param_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    live = at < tl.where(tl.load(terms_ptr) != 0.0, size, 0)
    grad = grad_raw.to(tl.float32) * tl.load(terms_ptr + 1)
    exp_avg += rest1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    root = tl.sqrt_rn(exp_avg_sq) * tl.load(terms_ptr + 3)
    param *= tl.where(at < decayed, tl.load(terms_ptr + 4), 1.0)
    param -= tl.load(terms_ptr + 2) * exp_avg / (root + eps)
    tl.store(param_ptr + at, param, mask=live)
    tl.store(exp_avg_ptr + at, exp_avg, mask=live, eviction_policy="evict_first")
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=live, eviction_policy="evict_first")
    tl.store(grad_ptr + at, tl.zeros_like(grad_raw), mask=live)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, param, mask=live)


def _squares_output(grad: Tensor, inv_scale: Tensor) -> Tensor:
    chunks = triton.cdiv(grad.shape[0], launch("adamw_squares", 0, grad).cols)
    return grad.new_empty(chunks, dtype=torch.float32)


@primitive("adamw_squares(Tensor grad, Tensor inv_scale) -> Tensor", fake=_squares_output)
def adamw_squares(grad: Tensor, inv_scale: Tensor) -> Tensor:
    """grad [N] contiguous, inv_scale fp32 [1] -> fp32 [chunks]."""
    squares = _squares_output(grad, inv_scale)
    config = launch("adamw_squares", 0, grad)
    run(adamw_squares_kernel, (squares.shape[0],), config, grad, inv_scale, squares, grad.shape[0])
    return squares


def _update_output(param: Tensor, *_: object) -> Tensor:
    return param.new_empty(())


@primitive(
    "adamw_update(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) step, "
    "Tensor lr, Tensor inv_scale, Tensor squares, Tensor? guard, Tensor(f!)? copy, int decayed, float beta1, "
    "float beta2, float eps, float weight_decay, float? max_norm) -> Tensor",
    fake=_update_output,
)
def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    inv_scale: Tensor,
    squares: Tensor,
    guard: Tensor | None,
    copy: Tensor | None,
    decayed: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float | None,
) -> Tensor:
    """All contiguous -> norm fp32 []. `squares` as adamw_squares gives them, of all gradients that share the norm."""
    norm = _update_output(param)
    terms = param.new_empty(TERMS)
    run(
        adamw_decide_kernel, (1,), launch("adamw_decide", 0, param),
        squares, step, lr, inv_scale, guard, norm, terms, squares.shape[0],
        _log(beta1), _log(beta2), weight_decay, _or_infinity(max_norm), NORM_EPS,
    )  # fmt: skip
    size, config = param.shape[0], launch("adamw_update", 0, param)
    run(
        adamw_update_kernel, (triton.cdiv(size, config.cols),), config,
        param, grad, exp_avg, exp_avg_sq, copy, terms, size, decayed, 1.0 - beta1, beta2, 1.0 - beta2, eps,
    )  # fmt: skip
    return norm


def sum_squares(grad: Tensor, inv_scale: Tensor) -> Tensor:
    """The squares of grad [N] * inv_scale [1], summed in parts: fp32 of one dimension. Where several flat gradients
    share one norm, the parts of all of them, one after another, are what `adamw` takes as `squares`."""
    if choose("adamw", grad, ("triton", "reference")) == "reference":
        return sum_squares_reference(grad, inv_scale)
    return adamw_squares(grad, inv_scale)


@torch.no_grad()
def adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, inv_scale: Tensor, *,
    decayed: int, beta1: float, beta2: float, eps: float, weight_decay: float, max_norm: float | None = None,
    guard: Tensor | None = None, copy: Tensor | None = None, squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One AdamW step in place, or none where the gradient's norm or `guard` is not finite; the host does not wait.

    Afterwards the gradient is zero; after a step that was not finite it is what it was.

    Args:
        param, exp_avg, exp_avg_sq: fp32 [N]. grad: [N], fp16, bf16 or fp32.
        step: fp32 [1], updates done so far; one more afterwards. lr, inv_scale: fp32 [1]; the gradient is multiplied by
            inv_scale first.
        decayed: the first elements, so many, have weight decay.
        max_norm: a longer gradient is shortened to this global norm; None: it is not.
        guard: fp32 [], must be finite too. copy: [N], gets param in its own dtype.
        squares: what `sum_squares` gave for all gradients that share the norm, where that is not `grad` alone.

    Returns:
        fp32 [], the norm of grad * inv_scale before it was clipped.

    Raises:
        ValueError: a buffer is of another shape or dtype or not contiguous, or `decayed` or a beta is out of range.
    """
    _check(param, grad, exp_avg, exp_avg_sq, copy)
    for name, value in (("step", step), ("lr", lr), ("inv_scale", inv_scale)):
        if value.shape != (1,):
            raise ValueError(f"adamw takes {name} [1], got {tuple(value.shape)}")
    if not 0 <= decayed <= param.shape[0]:
        raise ValueError(f"adamw takes decayed from 0 to {param.shape[0]}, got {decayed}")
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"adamw takes betas from 0 to below 1, got {beta1} and {beta2}")
    if choose("adamw", param, ("triton", "reference")) == "reference":
        return adamw_reference(
            param, grad, exp_avg, exp_avg_sq, step, lr, inv_scale, decayed=decayed, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, max_norm=max_norm, guard=guard, copy=copy, squares=squares,
        )  # fmt: skip
    return adamw_update(
        param, grad, exp_avg, exp_avg_sq, step, lr, inv_scale,
        adamw_squares(grad, inv_scale) if squares is None else squares,
        guard, copy, decayed, beta1, beta2, eps, weight_decay, max_norm,
    )  # fmt: skip


def _check(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None) -> None:
    """Raises ValueError unless these are flat buffers that fit together."""
    buffers = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    buffers |= {"copy": copy} if copy is not None else {}
    for name, x in buffers.items():
        if x.ndim != 1 or x.shape != param.shape or not x.is_contiguous():
            raise ValueError(
                f"adamw takes flat contiguous buffers of one length, got {name} {tuple(x.shape)}, "
                f"strides {x.stride()}, beside param {tuple(param.shape)}"
            )
    if {param.dtype, exp_avg.dtype, exp_avg_sq.dtype} not in ({torch.float32}, {torch.float64}):
        raise ValueError(
            f"adamw keeps param and moments in fp32, got {param.dtype}, {exp_avg.dtype} and {exp_avg_sq.dtype}"
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _or_infinity(max_norm: float | None) -> float:
    return math.inf if max_norm is None else max_norm
