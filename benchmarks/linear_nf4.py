"""Linear layer on a frozen NF4 weight, from one token to 8,192: forward, and forward with dX (goals G2, G3, G13).

cublas is the product with the weight in bf16, which is what dequantizing may cost on top of. Least operations: 2 M N K
each way; below 128 tokens the weight's bytes bound it instead: 0.516 of a byte each, read once.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.peers import bitsandbytes_linear, parts, whole
from benchmarks.problem import TRAINING, Bench, Case, Cost, Inputs, Problem, Variant, normal, products
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.linear_nf4 import linear_nf4
from kernels.nf4 import quantize_nf4

DECODE = (1, 8, 32, 128)
TRAIN = (512, 2048, 8192)


def cases() -> list[Case]:
    shapes = ((4096, 4096), (11008, 4096), (4096, 11008))
    decode = [Case("linear_nf4", {"M": m, "N": n, "K": k}, modes=("forward",)) for m in DECODE for n, k in shapes]
    train = [Case("linear_nf4", {"M": m, "N": n, "K": k}, modes=TRAINING) for m in TRAIN for n, k in shapes]
    return decode + train


def problem(case: Case, device: torch.device) -> Problem:
    m, n, k = (case.shape[key] for key in ("M", "N", "K"))

    def draw(generator: torch.Generator) -> Inputs:
        return {"x": normal(generator, m, k), **parts(quantize_nf4(normal(generator, n, k, scale=k**-0.5)))}

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        return (linear_nf4(inputs["x"], whole(inputs, n, k)),)

    def dense(inputs: Inputs) -> Inputs:
        return inputs | {"dense": dequantize_nf4_reference(whole(inputs, n, k), torch.bfloat16)}

    def product(inputs: Inputs) -> tuple[Tensor, ...]:
        return (F.linear(inputs["x"], inputs["dense"]),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs["x"].float() @ dequantize_nf4_reference(whole(inputs, n, k), torch.float32).T,)

    once = 2 * m * n * k
    is_decode = m < 128 and "backward" not in case.modes
    weight_bytes = n * k // 2 + n * k // 64 + n * k // (64 * 256) * 4
    return Problem(
        draw=draw,
        differentiable=("x",) if "backward" in case.modes else (),
        reference=reference,
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("cublas", lambda: product, prepare=dense),
            Variant(
                "bitsandbytes",
                lambda: lambda inputs: (inputs["call"](inputs["x"]),),
                package="bitsandbytes",
                prepare=lambda inputs: inputs | {"call": bitsandbytes_linear(whole(inputs, n, k))},
            ),
        ),
        cost={"forward": Cost(bytes=weight_bytes)} if is_decode else products(once, once),
    )


BENCH = Bench("linear_nf4", __doc__ or "", cases, problem, tiny={"M": 6, "N": 32, "K": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
