"""Sum of two branches through dropout: Phi-2's residual, its masks hashed in passing (no goal).

Ours and the peers must drop the same elements to be compared: theirs get their masks ready, one byte an element, and
do not pay for drawing them. Least bytes, in passes over [T, D]: forward a, b in, y out; backward dy in, da, db out.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Case, Inputs, Problem, Variant, compiled, normal, passes
from kernels.dropout import keep_mask
from kernels.dropped_sum import dropped_sum, dropped_sum_reference

P, SITE = 0.1, 0


def cases() -> list[Case]:
    return [Case("dropped_sum", {"T": tokens, "D": 2560}, quick=False) for tokens in (512, 2048, 8192)]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, width = case.shape["T"], case.shape["D"]
    seed = torch.tensor([2024], device=device)
    masks = [keep_mask(seed, SITE + i, tokens, width, P, device) for i in range(2)]

    def draw(generator: torch.Generator) -> Inputs:
        return {"a": normal(generator, tokens, width), "b": normal(generator, tokens, width)}

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        return (dropped_sum(inputs["a"], inputs["b"], dropout=P, seed=seed, site=SITE),)

    def expression(inputs: Inputs) -> tuple[Tensor, ...]:
        first, second = (x * mask / (1 - P) for x, mask in zip((inputs["a"], inputs["b"]), masks, strict=True))
        return (first + second,)

    return Problem(
        draw=draw,
        differentiable=("a", "b"),
        reference=lambda inputs: (dropped_sum_reference(inputs["a"], inputs["b"], P, seed, SITE),),
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("torch", lambda: expression),
            Variant("compile", lambda: compiled(expression), quick=False),
        ),
        cost=passes(3, 3, tokens, width),
    )


BENCH = Bench("dropped_sum", __doc__ or "", cases, problem, tiny={"T": 5, "D": 48})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
