"""Eight NF4 linears one after another, each unpacked while the product before it runs (goal G2, with overlap).

nibble unpacks each weight when its product is due, nibble_overlap has the next one unpacked on a second stream
meanwhile: all but the first. cublas is the products alone, with the weights in bf16. Least operations: 2 M N K each.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.peers import parts, require_csrc, whole
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, normal, products
from kernels import unpacked
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.linear_nf4 import linear_nf4
from kernels.nf4 import NF4Tensor, quantize_nf4

LINKS = 8


def cases() -> list[Case]:
    shapes = ((4096, 4096), (11008, 4096), (4096, 11008))
    return [
        Case("linear_nf4_chain", {"M": m, "N": n, "K": k}, modes=("forward",)) for m in (2048, 8192) for n, k in shapes
    ]


def problem(case: Case, device: torch.device) -> Problem:
    m, n, k = (case.shape[key] for key in ("M", "N", "K"))

    def draw(generator: torch.Generator) -> Inputs:
        weights: Inputs = {}
        for i in range(LINKS):
            weights |= parts(quantize_nf4(normal(generator, n, k, scale=k**-0.5)), str(i))
        return {"x": normal(generator, m, k), **weights}

    def packed(inputs: Inputs) -> list[NF4Tensor]:
        return [whole(inputs, n, k, str(i)) for i in range(LINKS)]

    def bound(inputs: Inputs) -> Inputs:
        return inputs | {"weights": packed(inputs)}

    def chain(overlap: bool) -> Call:
        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            unpacked.forget()
            unpacked.configure(scratch_bytes=2 * 2 * n * k, prefetch=overlap)
            try:
                return tuple(linear_nf4(inputs["x"], q) for q in inputs["weights"])
            finally:
                unpacked.configure()
                unpacked.forget()

        return call

    def dense(inputs: Inputs) -> Inputs:
        return inputs | {"dense": [dequantize_nf4_reference(q, torch.bfloat16) for q in packed(inputs)]}

    def product(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(F.linear(inputs["x"], weight) for weight in inputs["dense"])

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(inputs["x"].float() @ dequantize_nf4_reference(q, torch.float32).T for q in packed(inputs))

    return Problem(
        draw=draw,
        differentiable=(),
        reference=reference,
        variants=(
            Variant("nibble", lambda: require_csrc(chain(overlap=False)), prepare=bound),
            Variant("nibble_overlap", lambda: require_csrc(chain(overlap=True)), prepare=bound),
            Variant("cublas", lambda: product, prepare=dense),
        ),
        cost=products(2 * m * n * k * LINKS, 0),
    )


BENCH = Bench("linear_nf4_chain", __doc__ or "", cases, problem, tiny={"M": 6, "N": 32, "K": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
