"""LayerNorm with frozen affine parameters, alone and with the residual added in the same pass (goal G5).

add=2 is Phi's parallel block: attention and MLP both read y, and both their gradients come back.
Least bytes, in passes over [T, D]: forward x, y (add: stream, delta in, stream, y out); backward dy, x in, dx out (add:
dstream and, for two branches, the second dy too).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, compiled, normal, passes
from kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference

EPS = 1e-5


def cases() -> list[Case]:
    """257 tokens for each of 8 tiles of a CLIP tower, and 4,096 tokens of a tower and of Phi-2."""
    shapes = ((2056, 1024, 0), (4096, 1024, 0), (4096, 2560, 0), (2056, 1024, 1), (4096, 2560, 2))
    return [Case("layer_norm", {"T": tokens, "D": width, "add": add}) for tokens, width, add in shapes]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, width, add = case.shape["T"], case.shape["D"], case.shape["add"]

    def draw(generator: torch.Generator) -> Inputs:
        affine = {"weight": normal(generator, width), "bias": normal(generator, width)}
        inputs = {"x": normal(generator, tokens, width), **affine}
        return inputs | ({"delta": normal(generator, tokens, width)} if add else {})

    return Problem(
        draw=draw,
        differentiable=("x", "delta") if add else ("x",),
        reference=_with(_reference_norm, add),
        variants=(
            Variant("nibble", lambda: _nibble(add)),
            Variant("torch", lambda: _with(_torch_norm, add)),
            Variant("compile", lambda: _compile(add), quick=False),
            Variant("liger", lambda: _liger(add), package="liger-kernel"),
            Variant("apex", lambda: _apex(add), package="apex"),
        ),
        cost=passes(4, 3 + add, tokens, width) if add else passes(2, 3, tokens, width),
    )


def _reference_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm_reference(x, weight, bias, EPS)


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _with(norm: Any, add: int) -> Call:
    """`norm` of the stream, or of stream + delta, its result as often as it is read."""

    def plain(inputs: Inputs) -> tuple[Tensor, ...]:
        return (norm(inputs["x"], inputs["weight"], inputs["bias"]),)

    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        stream = inputs["x"] + inputs["delta"]
        return stream, *add * (norm(stream, inputs["weight"], inputs["bias"]),)

    return added if add else plain


def _nibble(add: int) -> Call:
    if not add:
        return lambda inputs: (layer_norm(inputs["x"], inputs["weight"], inputs["bias"], EPS),)

    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        x, delta, weight, bias = (inputs[name] for name in ("x", "delta", "weight", "bias"))
        return tuple(add_layer_norm(x, delta, weight, bias, EPS, branches=add))

    return added


def _compile(add: int) -> Call:
    if not add:
        return _with(compiled(_torch_norm), 0)

    def add_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + delta
        return stream, _torch_norm(stream, weight, bias)

    fused = compiled(add_norm)

    def added(inputs: Inputs) -> tuple[Tensor, ...]:
        stream, y = fused(inputs["x"], inputs["delta"], inputs["weight"], inputs["bias"])
        return stream, *add * (y,)

    return added


def _liger(add: int) -> Call:
    from liger_kernel.ops import LigerLayerNormFunction

    return _with(lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS), add)


def _apex(add: int) -> Call:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return _with(lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, tuple(weight.shape), EPS), add)


BENCH = Bench("layer_norm", __doc__ or "", cases, problem, tiny={"T": 7, "D": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
