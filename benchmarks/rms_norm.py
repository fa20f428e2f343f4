"""RMSNorm with a frozen weight, alone and with the residual added in the same pass (goal G4).

Least bytes, in passes over [T, D]: forward x, y (with add: stream, delta in, stream, y out); backward dy, x in, dx out
(with add: dy, dstream, stream in, dx out, which is delta's gradient too).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, compiled, normal, passes
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-6


def cases() -> list[Case]:
    return [
        Case("rms_norm", {"T": tokens, "D": width, "add": add})
        for add in (0, 1)
        for width in (4096, 5120)
        for tokens in (512, 2048, 8192)
    ]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, width, add = case.shape["T"], case.shape["D"], case.shape["add"]

    def draw(generator: torch.Generator) -> Inputs:
        inputs = {"x": normal(generator, tokens, width), "weight": normal(generator, width)}
        return inputs | ({"delta": normal(generator, tokens, width)} if add else {})

    return Problem(
        draw=draw,
        differentiable=("x", "delta") if add else ("x",),
        reference=_with(_reference_norm, add),
        variants=(
            Variant("nibble", lambda: _nibble(add)),
            Variant("torch", lambda: _with(_torch_norm, add)),
            Variant("compile", lambda: _compile(add)),
            Variant("liger", lambda: _liger(add), package="liger-kernel"),
            Variant("apex", lambda: _apex(add), package="apex"),
        ),
        cost=passes(4, 4, tokens, width) if add else passes(2, 3, tokens, width),
    )


def _reference_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, EPS)


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _with(norm: Any, add: int) -> Call:
    """`norm` of the stream, or of stream + delta."""

    def plain(inputs: Inputs) -> tuple[Tensor, ...]:
        return (norm(inputs["x"], inputs["weight"]),)

    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        stream = inputs["x"] + inputs["delta"]
        return stream, norm(stream, inputs["weight"])

    return added if add else plain


def _nibble(add: int) -> Call:
    if add:
        return lambda inputs: add_rms_norm(inputs["x"], inputs["delta"], inputs["weight"], EPS)
    return lambda inputs: (rms_norm(inputs["x"], inputs["weight"], EPS),)


def _compile(add: int) -> Call:
    if not add:
        return _with(compiled(_torch_norm), 0)

    def add_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + delta
        return stream, _torch_norm(stream, weight)

    fused = compiled(add_norm)
    return lambda inputs: fused(inputs["x"], inputs["delta"], inputs["weight"])


def _liger(add: int) -> Call:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerRMSNormFunction

    if not add:
        return lambda inputs: (LigerRMSNormFunction.apply(inputs["x"], inputs["weight"], EPS),)

    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        y, stream = LigerFusedAddRMSNormFunction.apply(inputs["delta"], inputs["x"], inputs["weight"], EPS)
        return stream, y

    return added


def _apex(add: int) -> Call:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return _with(lambda x, weight: fused_rms_norm_affine(x, weight, tuple(weight.shape), EPS), add)


BENCH = Bench("rms_norm", __doc__ or "", cases, problem, tiny={"T": 7, "D": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
