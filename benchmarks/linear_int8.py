"""Linear layers on frozen row-wise int8 weights: at decode, and forward with dX.

cublas is the product with the weight in bf16, torch the dequantization in plain torch before it. Least operations:
2 M N K each way; below 128 tokens the weight's bytes bound it instead: one each and four a row, read once.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.peers import require_csrc
from benchmarks.problem import TRAINING, Bench, Case, Cost, Inputs, Problem, Variant, normal, products
from kernels import unpacked
from kernels.int8 import Int8Tensor, dequantize_int8_reference, quantize_int8
from kernels.linear_int8 import linear_int8


def cases() -> list[Case]:
    shapes = ((4096, 4096), (11008, 4096), (4096, 11008))
    decode = [Case("linear_int8", {"M": m, "N": n, "K": k}, modes=("forward",)) for m in (1, 8, 64) for n, k in shapes]
    train = [Case("linear_int8", {"M": m, "N": n, "K": k}, modes=TRAINING) for m in (512, 2048) for n, k in shapes]
    return [Case(c.bench, c.shape, c.modes, quick=False) for c in (*decode, *train)]


def problem(case: Case, device: torch.device) -> Problem:
    m, n, k = (case.shape[key] for key in ("M", "N", "K"))

    def draw(generator: torch.Generator) -> Inputs:
        q = quantize_int8(normal(generator, n, k, scale=k**-0.5))
        return {"x": normal(generator, m, k), "codes": q.codes, "scale": q.scale}

    def packed(inputs: Inputs) -> Int8Tensor:
        return Int8Tensor(codes=inputs["codes"], scale=inputs["scale"], dtype=torch.bfloat16)

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        unpacked.forget()
        return (linear_int8(inputs["x"], inputs["weight"]),)

    def eager(inputs: Inputs) -> tuple[Tensor, ...]:
        return (F.linear(inputs["x"], dequantize_int8_reference(packed(inputs), torch.bfloat16)),)

    def product(inputs: Inputs) -> tuple[Tensor, ...]:
        return (F.linear(inputs["x"], inputs["dense"]),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs["x"].float() @ dequantize_int8_reference(packed(inputs), torch.float32).T,)

    once = 2 * m * n * k
    is_decode = m < 128 and "backward" not in case.modes
    return Problem(
        draw=draw,
        differentiable=("x",) if "backward" in case.modes else (),
        reference=reference,
        variants=(
            Variant(
                "nibble",
                lambda: require_csrc(nibble),
                prepare=lambda inputs: inputs | {"weight": packed(inputs)},
            ),
            Variant(
                "cublas",
                lambda: product,
                prepare=lambda inputs: inputs | {"dense": dequantize_int8_reference(packed(inputs), torch.bfloat16)},
            ),
            Variant("torch", lambda: eager),
        ),
        cost={"forward": Cost(bytes=n * k + 4 * n)} if is_decode else products(once, once),
    )


BENCH = Bench("linear_int8", __doc__ or "", cases, problem, tiny={"M": 6, "N": 32, "K": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
