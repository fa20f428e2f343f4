"""Each op, forward and backward, against its formula in 64 bits on this machine: the part of doctor.py that computes.

The shapes are small and odd, the dtype is that of a run here. An error is the largest difference of a result or of one
of its gradients, divided by the largest value that it should have.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from triton import TritonError

from kernels import dispatch
from kernels.activation import bias_act, bias_act_reference
from kernels.adamw import adamw, adamw_reference
from kernels.attention import varlen_attention, varlen_attention_reference
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.dropped_sum import dropped_sum, dropped_sum_reference
from kernels.int8 import Int8Tensor, dequantize_int8, quantize_int8
from kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from kernels.linear_act import linear_act, linear_act_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear_int8 import linear_int8, linears_int8
from kernels.linear_nf4 import linear_nf4, linears_nf4
from kernels.lora_linear import lora_linear, lora_linear_reference
from kernels.nf4 import BLOCK, BLOCK2, LEVELS, NF4Tensor, dynamic_map, quantize_nf4
from kernels.norm_mma import add_norm_mma, norm_mma, norm_mma_reference
from kernels.projector import projector_mlp, projector_mlp_reference
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from kernels.rope import rope, rope_reference, rope_table
from kernels.swiglu import swiglu, swiglu_packed, swiglu_reference

# Of rounded inputs and sums over some hundred of them; a wrong kernel is wrong by about 1.
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NF4_STEP = 0.2  # half of the widest gap between two levels (0.152), and the rounding of absmax
INT8_STEP = 0.005  # half of 1/127, and the rounding of what is compared
EPS = 1e-5
T, D, H = 65, 96, 8  # tokens, width, width of the adapter's bottleneck
FAILURES = (RuntimeError, ValueError, OSError, ImportError, TritonError, subprocess.CalledProcessError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An op on its inputs (on the CPU): `trained` have gradients, `fixed` have none."""

    name: str
    op: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    trained: tuple[Tensor, ...] = ()
    fixed: tuple[Tensor, ...] = ()
    decided_as: str = ""  # in dispatch, where it has another name there
    allowed: float = 0.0  # 0: by dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCheck:
    """What came of one case. Errors are None where there is nothing to compare, or where it failed."""

    op: str
    backend: str
    why: str
    forward: float | None
    backward: float | None
    allowed: float
    failure: str = ""

    @property
    def ok(self) -> bool:
        errors = [error for error in (self.forward, self.backward) if error is not None]
        return not self.failure and all(error <= self.allowed for error in errors)  # NaN is not


def check_ops(device: torch.device, dtype: torch.dtype) -> list[OpCheck]:
    """Runs every op on `device` in `dtype`. What an op raises is its result."""
    listener = _Listener()
    level = dispatch.log.level
    dispatch.log.addHandler(listener)
    dispatch.log.setLevel(logging.INFO)
    try:
        return [_check(case, device, dtype, listener.reasons) for case in cases(device, dtype)]
    finally:
        dispatch.log.removeHandler(listener)
        dispatch.log.setLevel(level)


class _Listener(logging.Handler):
    """Remembers why dispatch decided as it did, which it says once in its log."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        op, _, reason = cast(tuple[str, str, str], record.args)
        self.reasons[op] = reason


def _check(case: Case, device: torch.device, dtype: torch.dtype, reasons: dict[str, str]) -> OpCheck:
    forward = backward = None
    failure = ""
    try:
        forward, backward = _errors(case, device)
    except FAILURES as error:
        failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    known_as = case.decided_as or case.name
    backend, why = dispatch.decisions().get(known_as), reasons.get(known_as, "")
    return OpCheck(
        op=case.name, backend=backend or "torch", why=why if backend else "the only implementation",
        forward=forward, backward=backward, allowed=case.allowed or ALLOWED[dtype], failure=failure,
    )  # fmt: skip


def _errors(case: Case, device: torch.device) -> tuple[float, float | None]:
    leaves = [x.detach().to(device).requires_grad_() for x in case.trained]
    exact_leaves = [x.detach().double().requires_grad_() for x in case.trained]
    got = case.op(*leaves, *(x.to(device) for x in case.fixed))
    exact = case.formula(*exact_leaves, *(x.double() if x.is_floating_point() else x for x in case.fixed))
    if not leaves:
        return _error(got, exact), None
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    gradients = torch.autograd.grad(got, leaves, grad.to(device))
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    return _error(got, exact), max(map(_error, gradients, exact_gradients))


def _error(got: Tensor, exact: Tensor) -> float:
    got, exact = got.detach().cpu().double(), exact.detach()
    return float((got - exact).abs().max() / exact.abs().max())


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One or two cases an op, in the order of a layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def draw32(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield Case(
        name="rms_norm", trained=(draw(T, D), draw32(D)),
        op=lambda x, w: rms_norm(x, w, EPS), formula=lambda x, w: rms_norm_reference(x, w, EPS),
    )  # fmt: skip
    yield Case(
        name="add_rms_norm", trained=(draw(T, D), draw(T, D)), fixed=(draw(D),), decided_as="rms_norm",
        op=lambda x, delta, w: torch.cat(add_rms_norm(x, delta, w, EPS)),
        formula=lambda x, delta, w: torch.cat((x + delta, rms_norm_reference(x + delta, w, EPS))),
    )  # fmt: skip
    yield Case(
        name="layer_norm", trained=(draw(T, D), draw32(D), draw32(D)),
        op=lambda x, w, b: layer_norm(x, w, b, EPS), formula=lambda x, w, b: layer_norm_reference(x, w, b, EPS),
    )  # fmt: skip
    yield Case(
        name="add_layer_norm", trained=(draw(T, D), draw(T, D)), fixed=(draw32(D), draw32(D)), decided_as="layer_norm",
        op=lambda x, delta, w, b: torch.cat(add_layer_norm(x, delta, w, b, EPS, branches=2)),
        formula=lambda x, delta, w, b: torch.cat((x + delta, *2 * (layer_norm_reference(x + delta, w, b, EPS),))),
    )  # fmt: skip
    adapter = (draw32(H, D), draw32(H), draw32(D, H // 2), draw32(D), draw32(D, H // 2), draw32(D))
    mix, row, seed = draw32(2, 2).softmax(-1), torch.arange(T) % 2, torch.tensor([7])
    yield Case(
        name="norm_mma, RMSNorm", trained=(draw(T, D), *adapter, mix), fixed=(draw(D), row, seed),
        op=lambda x, dw, db, w0, b0, w1, b1, mix, norm, row, seed: norm_mma(
            x, norm, None, EPS, dw, db, w0, b0, w1, b1, mix, row, scale=0.5, dropout=0.1, seed=seed
        ),
        formula=lambda x, dw, db, w0, b0, w1, b1, mix, norm, row, seed: norm_mma_reference(
            x, norm, None, EPS, [dw, db, w0, b0, w1, b1], mix, row, 0.5, 0.1, seed, 0
        ),
        decided_as="norm_mma",
    )  # fmt: skip
    yield Case(
        name="norm_mma, LayerNorm", trained=(draw(T, D), *adapter, draw32(T, 2).softmax(-1)),
        fixed=(draw32(D), draw32(D)),
        op=lambda x, dw, db, w0, b0, w1, b1, mix, norm, bias: norm_mma(
            x, norm, bias, EPS, dw, db, w0, b0, w1, b1, mix, None, scale=0.5
        ),
        formula=lambda x, dw, db, w0, b0, w1, b1, mix, norm, bias: norm_mma_reference(
            x, norm, bias, EPS, [dw, db, w0, b0, w1, b1], mix, None, 0.5, 0.0, None, 0
        ),
        decided_as="norm_mma",
    )  # fmt: skip
    yield Case(
        name="add_norm_mma", trained=(draw(T, D), draw(T, D), *adapter, mix), fixed=(draw(D), row),
        op=lambda x, delta, dw, db, w0, b0, w1, b1, mix, norm, row: torch.cat(
            add_norm_mma(x, delta, norm, None, EPS, dw, db, w0, b0, w1, b1, mix, row, scale=0.5)
        ),
        formula=lambda x, delta, dw, db, w0, b0, w1, b1, mix, norm, row: torch.cat((
            x + delta,
            norm_mma_reference(x + delta, norm, None, EPS, [dw, db, w0, b0, w1, b1], mix, row, 0.5, 0.0, None, 0),
        )),
        decided_as="norm_mma",
    )  # fmt: skip
    yield Case(
        name="activation", trained=(draw(T, D), draw32(D)), decided_as="bias_act",
        op=lambda z, b: bias_act(z, b, "gelu"), formula=lambda z, b: bias_act_reference(z, b, "gelu"),
    )  # fmt: skip
    yield Case(
        name="linear_act", trained=(draw(T, D), draw(128, D), draw32(128)),
        op=lambda x, w, b: linear_act(x, w, b, "quick_gelu", own=True),
        formula=lambda x, w, b: linear_act_reference(x, w, b, "quick_gelu"),
    )  # fmt: skip
    yield Case(
        name="projector_mlp", trained=(draw(T, D), draw32(128, D), draw32(128), draw32(40, 128), draw32(40)),
        op=lambda x, w1, b1, w2, b2: projector_mlp(x, w1, b1, w2, b2, "silu"),
        formula=lambda x, w1, b1, w2, b2: projector_mlp_reference(x, w1, b1, w2, b2, "silu"),
    )  # fmt: skip
    cos, sin = rope_table(32, T, 10000.0)
    yield Case(
        name="rope", trained=(draw(T, 4, 32), draw(T, 2, 32)), fixed=(cos, sin, torch.arange(T).flip(0)),
        op=lambda q, k, cos, sin, at: torch.cat(rope(q, k, cos, sin, at, interleaved=True), dim=1),
        formula=lambda q, k, cos, sin, at: rope_reference(torch.cat((q, k), dim=1), cos[at], sin[at], True),
    )  # fmt: skip
    yield Case(
        name="rope, partial", trained=(draw(T, 4, 80), draw(T, 2, 80)), fixed=(cos, sin, torch.arange(T).flip(0)),
        op=lambda q, k, cos, sin, at: torch.cat(rope(1 * q, 1 * k, cos, sin, at, interleaved=False, inplace=True), 1),
        formula=lambda q, k, cos, sin, at: rope_reference(torch.cat((q, k), dim=1), cos[at], sin[at], False),
        decided_as="rope",
    )  # fmt: skip
    yield Case(name="swiglu", trained=(draw(T, D), draw(T, D)), op=swiglu, formula=swiglu_reference)
    yield Case(
        name="swiglu_packed", trained=(draw(T, 2 * D),), decided_as="swiglu", op=swiglu_packed,
        formula=lambda gate_up: swiglu_reference(*gate_up.chunk(2, dim=1)),
    )  # fmt: skip
    yield Case(
        name="dropped_sum", trained=(draw(T, D), draw(T, D)), fixed=(seed,),
        op=lambda a, b, seed: dropped_sum(a, b, dropout=0.1, seed=seed, site=1 << 17),
        formula=lambda a, b, seed: dropped_sum_reference(a, b, 0.1, seed, 1 << 17),
    )  # fmt: skip
    bounds = torch.tensor([0, 1, 2, 37, 37, T], dtype=torch.int32)  # lengths as in a pack, an empty one too
    yield Case(
        name="attention", trained=(draw(T, 4, 32), draw(T, 2, 32), draw(T, 2, 32)), fixed=(bounds,),
        op=lambda q, k, v, bounds: varlen_attention(q, k, v, bounds, 35, causal=True),
        formula=lambda q, k, v, bounds: varlen_attention_reference(q, k, v, bounds, causal=True),
    )  # fmt: skip
    yield Case(
        name="attention in a window", trained=(draw(T, 4, 32), draw(T, 2, 32), draw(T, 2, 32)), fixed=(bounds,),
        op=lambda q, k, v, bounds: varlen_attention(q, k, v, bounds, 35, causal=True, window=9),
        formula=lambda q, k, v, bounds: varlen_attention_reference(q, k, v, bounds, causal=True, window=9),
        decided_as="attention",
    )  # fmt: skip
    yield Case(
        name="bidirectional attention", trained=tuple(draw(T, 2, 72) for _ in range(3)), fixed=(bounds,),
        op=lambda q, k, v, bounds: varlen_attention(q, k, v, bounds, 35, causal=False),
        formula=lambda q, k, v, bounds: varlen_attention_reference(q, k, v, bounds, causal=False),
        decided_as="attention",
    )  # fmt: skip
    lengths, cache = torch.tensor([0, 36, 20]), tuple(draw(3, 37, 2, 32) for _ in range(2))
    for name, window in (("decode_attention", None), ("decode_attention in a window", 9)):
        yield Case(
            name=name, fixed=(draw(3, 4, 32), draw(3, 2, 32), draw(3, 2, 32), *cache, lengths),
            op=lambda q, k, v, keys, values, lengths, window=window: decode_attention(
                q, k, v, 1 * keys, 1 * values, lengths, window=window
            ),
            formula=lambda q, k, v, keys, values, lengths, window=window: decode_attention_reference(
                q, k, v, 1 * keys, 1 * values, lengths, 32**-0.5, window
            ), decided_as="decode_attention",
        )  # fmt: skip
    yield Case(
        name="linear_cross_entropy", trained=(draw(T, D), draw(321, D)), fixed=(torch.arange(T) * 4, draw32(T).abs()),
        op=linear_cross_entropy, formula=linear_cross_entropy_reference,
    )  # fmt: skip
    yield Case(
        name="linear_cross_entropy with a bias", trained=(draw(T, D), draw(321, D), draw32(321)),
        fixed=(torch.arange(T) * 4, draw32(T).abs()), decided_as="linear_cross_entropy",
        op=lambda h, w, b, labels, weights: linear_cross_entropy(h, w, labels, weights, bias=b),
        formula=lambda h, w, b, labels, weights: linear_cross_entropy_reference(h, w, labels, weights, b),
    )  # fmt: skip
    yield Case(
        name="adamw", fixed=(draw32(T * D), draw(T * D), draw32(T * D), draw32(T * D).square(), torch.tensor([0.5])),
        op=lambda *state: _updated(adamw, *state), formula=lambda *state: _updated(adamw_reference, *state),
        allowed=ALLOWED[torch.float32],  # of a gradient in any dtype
    )  # fmt: skip
    yield Case(
        name="lora_linear", trained=(draw(T, D), draw32(H, D), draw32(40, H)), fixed=(draw(40, D), draw(40), seed),
        op=lambda x, a, b, w, bias, seed: lora_linear(x, w, bias, a, b, scaling=0.5, dropout=0.1, seed=seed),
        formula=lambda x, a, b, w, bias, seed: lora_linear_reference(x, w, bias, a, b, 0.5, 0.1, seed, 0),
    )  # fmt: skip
    yield from _packed(draw(50, 70), draw(T, 70), device, dtype)
    yield from _few_rows(draw(50, 192), draw(5, 192), device)


def _updated(
    update: Callable[..., Tensor], param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalar: Tensor
) -> Tensor:
    """What the third update makes of copies of these; `scalar` is the learning rate and the inverse scale."""
    buffers = [x.clone() for x in (param, grad, exp_avg, exp_avg_sq)]
    update(
        *buffers, 4 * scalar, scalar, scalar, decayed=T * D // 2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.02,
        max_norm=20.0,
    )  # fmt: skip
    return torch.cat(buffers)


def _packed(weight: Tensor, x: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The op has the weight packed on `device`, the formula the one packed on the CPU: the two must be the same."""

    def nf4() -> NF4Tensor:
        return quantize_nf4(weight.to(device))

    def int8() -> Int8Tensor:
        return quantize_int8(weight.to(device))

    nf4_weight, int8_weight = _nf4_formula(quantize_nf4(weight)), _int8_formula(quantize_int8(weight))
    yield Case(
        name="quantize_nf4", fixed=(weight,), allowed=NF4_STEP,
        op=lambda w: _nf4_formula(quantize_nf4(w)), formula=lambda w: w,
    )  # fmt: skip
    yield Case(name="dequantize_nf4", op=lambda: dequantize_nf4(nf4(), dtype), formula=lambda: nf4_weight)
    yield Case(name="linear_nf4", trained=(x,), op=lambda x: linear_nf4(x, nf4()), formula=lambda x: x @ nf4_weight.T)
    yield Case(
        name="quantize_int8", fixed=(weight,), allowed=INT8_STEP,
        op=lambda w: _int8_formula(quantize_int8(w)), formula=lambda w: w,
    )  # fmt: skip
    yield Case(name="dequantize_int8", op=lambda: dequantize_int8(int8(), dtype), formula=lambda: int8_weight)
    yield Case(
        name="linear_int8", trained=(x,), op=lambda x: linear_int8(x, int8()), formula=lambda x: x @ int8_weight.T
    )


def _few_rows(weight: Tensor, x: Tensor, device: torch.device) -> Iterator[Case]:
    """The fused products, in a shape that has tensor cores."""
    nf4, int8 = quantize_nf4(weight), quantize_int8(weight)
    nf4_weight, int8_weight = _nf4_formula(nf4), _int8_formula(int8)
    yield Case(
        name="few_rows, NF4", trained=(x,), decided_as="few_rows_nf4",
        op=lambda x: torch.cat(linears_nf4(x, 2 * (nf4.to(device),)), dim=1),
        formula=lambda x: (x @ nf4_weight.T).repeat(1, 2),
    )  # fmt: skip
    yield Case(
        name="few_rows, int8", trained=(x,), decided_as="few_rows_int8",
        op=lambda x: torch.cat(linears_int8(x, 2 * (int8.to(device),)), dim=1),
        formula=lambda x: (x @ int8_weight.T).repeat(1, 2),
    )  # fmt: skip


def _nf4_formula(q: NF4Tensor) -> Tensor:
    """The stored weight, fp64 on the CPU, straight from the definition of the format."""
    q = q.to("cpu")
    scale = q.absmax2.double().repeat_interleave(BLOCK2)[: q.absmax_codes.numel()]
    absmax = dynamic_map(q.device).double()[q.absmax_codes.int()] * scale + q.offset.double()
    nibbles = torch.stack((q.codes >> 4, q.codes & 15), dim=1).flatten()[: q.shape[0] * q.shape[1]]
    levels = torch.tensor(LEVELS, dtype=torch.float64)[nibbles.int()]
    return (levels * absmax.repeat_interleave(BLOCK)[: levels.numel()]).view(q.shape)


def _int8_formula(q: Int8Tensor) -> Tensor:
    return q.codes.cpu().double() * q.scale.cpu().double()[:, None] / 127
