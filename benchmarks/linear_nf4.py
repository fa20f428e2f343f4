"""Linear layers on frozen NF4 weights, from one token to 8,192: forward, and forward with dX (goals G2, G3, G13).

cublas is the product with the weight in bf16, which is what dequantizing may cost on top of. Least operations: 2 M N K
each way; below 128 tokens the weight's bytes bound it instead: 0.516 of a byte each, read once. `parts` layers share x
(q, k, v; gate, up): ours takes them in one call. Every forward unpacks its weight anew; a backward right after its
forward (mode full) finds it unpacked, as it does in a training step with checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.peers import bitsandbytes_linear, parts, require_csrc, whole
from benchmarks.problem import TRAINING, Bench, Case, Cost, Inputs, Problem, Variant, normal, products
from kernels import unpacked
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.linear_nf4 import linears_nf4
from kernels.nf4 import NF4Tensor, quantize_nf4

FEW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MANY = (512, 1024, 2048, 8192)
GOALS = (1, 8, 32, 128, 512, 2048, 8192)  # at every shape; the other sizes at the first
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SHARED = ({"N": 4096, "K": 4096, "parts": 3}, {"N": 11008, "K": 4096, "parts": 2})  # q, k, v; gate, up


def cases() -> list[Case]:
    found = []
    for m in (*FEW, *MANY):
        for n, k in SHAPES if m in GOALS else SHAPES[:1]:
            modes = TRAINING if m in MANY else ("forward",)
            found.append(Case("linear_nf4", {"M": m, "N": n, "K": k, "parts": 1}, modes=modes))
    for m in (1, 8, 2048):
        modes = TRAINING if m in MANY else ("forward",)
        found += [Case("linear_nf4", {"M": m, **shape}, modes=modes, quick=False) for shape in SHARED]
    return found


def problem(case: Case, device: torch.device) -> Problem:
    m, n, k, count = (case.shape[key] for key in ("M", "N", "K", "parts"))

    def draw(generator: torch.Generator) -> Inputs:
        weights: Inputs = {}
        for i in range(count):
            weights |= parts(quantize_nf4(normal(generator, n, k, scale=k**-0.5)), str(i))
        return {"x": normal(generator, m, k), **weights}

    def packed(inputs: Inputs) -> tuple[NF4Tensor, ...]:
        return tuple(whole(inputs, n, k, str(i)) for i in range(count))

    def bound(inputs: Inputs) -> Inputs:
        return inputs | {"weights": packed(inputs)}

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        unpacked.forget()
        return linears_nf4(inputs["x"], inputs["weights"], (None,) * count)

    def dense(inputs: Inputs) -> Inputs:
        return inputs | {"dense": [dequantize_nf4_reference(q, torch.bfloat16) for q in packed(inputs)]}

    def product(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(F.linear(inputs["x"], weight) for weight in inputs["dense"])

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(inputs["x"].float() @ dequantize_nf4_reference(q, torch.float32).T for q in packed(inputs))

    def peer(inputs: Inputs) -> tuple[Tensor, ...]:
        calls: list[Callable[[Tensor], Tensor]] = inputs["calls"]
        return tuple(call(inputs["x"]) for call in calls)

    once = 2 * m * n * k * count
    is_decode = m < 128 and "backward" not in case.modes
    weight_bytes = count * (n * k // 2 + n * k // 64 + n * k // (64 * 256) * 4)
    return Problem(
        draw=draw,
        differentiable=("x",) if "backward" in case.modes else (),
        reference=reference,
        variants=(
            Variant("nibble", lambda: require_csrc(nibble), prepare=bound),
            Variant("cublas", lambda: product, prepare=dense),
            Variant(
                "bitsandbytes",
                lambda: peer,
                package="bitsandbytes",
                prepare=lambda inputs: inputs | {"calls": [bitsandbytes_linear(q) for q in packed(inputs)]},
            ),
        ),
        cost={"forward": Cost(bytes=weight_bytes)} if is_decode else products(once, once),
    )


BENCH = Bench("linear_nf4", __doc__ or "", cases, problem, tiny={"M": 6, "N": 32, "K": 64})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
