"""SwiGLU, its backward in place over gate and up (goal G7).

packed=1: gate and up are the halves of one matrix [T, 2F], as one product leaves them. Least bytes, in passes over
[T, F]: forward gate, up in, h out; backward dh, gate, up in, dgate, dup out.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, compiled, normal, passes
from kernels.swiglu import swiglu, swiglu_packed, swiglu_reference


def cases() -> list[Case]:
    separate = [
        Case("swiglu", {"T": tokens, "F": width, "packed": 0})
        for width in (11008, 13824)
        for tokens in (512, 2048, 8192)
    ]
    return [*separate, Case("swiglu", {"T": 2048, "F": 11008, "packed": 1})]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, width, packed = case.shape["T"], case.shape["F"], case.shape["packed"]

    def draw(generator: torch.Generator) -> Inputs:
        if packed:
            return {"gate_up": normal(generator, tokens, 2 * width)}
        return {"gate": normal(generator, tokens, width), "up": normal(generator, tokens, width)}

    def split(inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs["gate_up"].chunk(2, dim=-1) if packed else (inputs["gate"], inputs["up"])

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        if packed:
            return (swiglu_packed(inputs["gate_up"], reuse=True),)
        return (swiglu(inputs["gate"], inputs["up"], reuse=True),)

    def expression(inputs: Inputs) -> tuple[Tensor, ...]:
        gate, up = split(inputs)
        return (F.silu(gate) * up,)

    return Problem(
        draw=draw,
        differentiable=("gate_up",) if packed else ("gate", "up"),
        reference=lambda inputs: (swiglu_reference(*split(inputs)),),
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("torch", lambda: expression),
            Variant("compile", lambda: compiled(expression), quick=False),
            Variant("liger", lambda: _liger(packed), package="liger-kernel"),
        ),
        cost=passes(3, 5, tokens, width),
    )


def _liger(packed: int) -> Call:
    if packed:
        from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

        return lambda inputs: (LigerFusedGateUpSiLUMulFunction.apply(inputs["gate_up"], True),)

    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda inputs: (LigerSiLUMulFunction.apply(inputs["gate"], inputs["up"]),)


BENCH = Bench("swiglu", __doc__ or "", cases, problem, tiny={"T": 5, "F": 48})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
