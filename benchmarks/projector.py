"""The MLP between tower and language model, and the tower's own (goal G8).

train=1: every parameter gets a gradient, as in LLaVA's mlp2x_gelu and in LaVIN's 1024-128-D; train=0: the frozen MLP of
a ViT. nibble_own and nibble_cublas choose the first product's implementation, which is how the table of
kernels/launches.py is made; nibble_recompute keeps x alone and repeats that product in the backward. Least operations:
2 N (K H + H D) forward; as many for dx, and as many again for the weights' gradients.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, compiled, normal, products
from kernels.activation import activation_reference
from kernels.projector import projector_mlp, projector_mlp_reference

PARAMETERS = ("w1", "b1", "w2", "b2")


def cases() -> list[Case]:
    llava = [
        Case("projector", {"N": 576 * images, "K": 1024, "H": 4096, "D": 4096, "act": "gelu", "train": 1})
        for images in (1, 4, 16)
    ]
    lavin = Case("projector", {"N": 48, "K": 1024, "H": 128, "D": 4096, "act": "silu", "train": 1}, quick=False)
    tower = Case("projector", {"N": 2056, "K": 1024, "H": 4096, "D": 1024, "act": "quick_gelu", "train": 0})
    return [*llava, lavin, tower]


def problem(case: Case, device: torch.device) -> Problem:
    n, k, h, d, act, train = (case.shape[key] for key in ("N", "K", "H", "D", "act", "train"))

    def draw(generator: torch.Generator) -> Inputs:
        return {
            "x": normal(generator, n, k),
            "w1": normal(generator, h, k, scale=k**-0.5), "b1": normal(generator, h, scale=0.1),
            "w2": normal(generator, d, h, scale=h**-0.5), "b2": normal(generator, d, scale=0.1),
        }  # fmt: skip

    def expression(inputs: Inputs) -> tuple[Tensor, ...]:
        hidden = activation_reference(F.linear(inputs["x"], inputs["w1"], inputs["b1"]), act)
        return (F.linear(hidden, inputs["w2"], inputs["b2"]),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        x, w1, b1, w2, b2 = (inputs[name] for name in ("x", *PARAMETERS))
        return (projector_mlp_reference(x, w1, b1, w2, b2, act),)

    def ours(**options: bool) -> Call:
        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            x, w1, b1, w2, b2 = (inputs[name] for name in ("x", *PARAMETERS))
            return (projector_mlp(x, w1, b1, w2, b2, act, **options),)

        return call

    once = 2 * n * (k * h + h * d)
    return Problem(
        draw=draw,
        differentiable=("x", *PARAMETERS) if train else ("x",),
        reference=reference,
        variants=(
            Variant("nibble", ours),
            Variant("nibble_own", lambda: ours(own=True)),
            Variant("nibble_cublas", lambda: ours(own=False)),
            Variant("nibble_recompute", lambda: ours(recompute=True)),
            Variant("torch", lambda: expression),
            Variant("compile", lambda: compiled(expression)),
        ),
        cost=products(once, 2 * once if train else once),
    )


BENCH = Bench("projector", __doc__ or "", cases, problem, tiny={"N": 9, "K": 24, "H": 32, "D": 16})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
