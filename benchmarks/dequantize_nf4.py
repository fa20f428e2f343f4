"""Dequantizing doubly quantized NF4 weights to bf16 (goal G1).

Least bytes a weight: half a byte of code, 1/64 of its block's absmax code, 4 / (64 * 256) of absmax2, two written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.peers import bitsandbytes_dequantize, parts, require_csrc, unsloth_dequantize, whole
from benchmarks.problem import Bench, Call, Case, Cost, Inputs, Problem, Variant, normal
from kernels.dequantize_nf4 import dequantize_nf4, dequantize_nf4_reference
from kernels.nf4 import NF4Tensor, quantize_nf4


def cases() -> list[Case]:
    shapes = ((4096, 4096), (11008, 4096), (4096, 11008), (13824, 5120))
    return [Case("dequantize_nf4", {"N": rows, "K": columns}, modes=("forward",)) for rows, columns in shapes]


def problem(case: Case, device: torch.device) -> Problem:
    rows, columns = case.shape["N"], case.shape["K"]

    def draw(generator: torch.Generator) -> Inputs:
        return parts(quantize_nf4(normal(generator, rows, columns)))

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        return (dequantize_nf4(whole(inputs, rows, columns)),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return (dequantize_nf4_reference(whole(inputs, rows, columns), torch.bfloat16),)

    def bound(inputs: Inputs, bind: Callable[[NF4Tensor], Callable[[], Tensor]]) -> Inputs:
        return inputs | {"call": bind(whole(inputs, rows, columns))}

    def peer() -> Call:
        return lambda inputs: (inputs["call"](),)

    weights = rows * columns
    least = weights // 2 + weights // 64 + weights // (64 * 256) * 4 + 2 * weights
    return Problem(
        draw=draw,
        differentiable=(),
        reference=reference,
        variants=(
            Variant("nibble", lambda: require_csrc(nibble)),
            Variant("torch", lambda: reference, quick=False),
            Variant(
                "bitsandbytes",
                peer,
                package="bitsandbytes",
                prepare=lambda inputs: bound(inputs, bitsandbytes_dequantize),
            ),
            Variant("unsloth", peer, package="unsloth", prepare=lambda inputs: bound(inputs, unsloth_dequantize)),
        ),
        cost={"forward": Cost(bytes=least)},
        tolerance=1e-3,  # a peer that rounds a few weights the other way is timed, and its error shown
    )


BENCH = Bench("dequantize_nf4", __doc__ or "", cases, problem, tiny={"N": 24, "K": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
