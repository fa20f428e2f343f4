"""Linear layers on a frozen weight with a LoRA beside it, alone and as q, k, v of one input.

y = x W^T + scaling (x A^T) B^T with W [K, K] in 16 or 4 bits, rank r. Without dropout, whose masks differ between
implementations. Least operations of one layer: 2 T K^2 + 4 T K r forward; 2 T K^2 + 8 T K r backward (dX, and the
gradients of A, B and of x through A).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.peers import bitsandbytes_linear, parts, require_csrc, whole
from benchmarks.problem import Bench, Call, Case, Inputs, Problem, Variant, compiled, normal, products
from kernels import unpacked
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.linear_nf4 import linear_nf4
from kernels.lora_linear import lora_linear, lora_linears
from kernels.nf4 import NF4Tensor, quantize_nf4

SCALING, RANK = 2.0, 16


def cases() -> list[Case]:
    return [
        Case("lora_linear", {"T": tokens, "K": 4096, "r": RANK, "bits": bits, "layers": layers}, quick=layers == 1)
        for layers in (1, 3)
        for bits in (16, 4)
        for tokens in (512, 2048, 8192)
    ]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, k, rank, bits, layers = (case.shape[key] for key in ("T", "K", "r", "bits", "layers"))
    names = [f"{name}{i}" for i in range(layers) for name in ("a", "b")]

    def draw(generator: torch.Generator) -> Inputs:
        shapes = {"a": (rank, k), "b": (k, rank)}
        inputs = {name: normal(generator, *shapes[name[0]], scale=k**-0.5) for name in names}
        for i in range(layers):
            dense = normal(generator, k, k, scale=k**-0.5)
            inputs |= {f"w{i}": dense} if bits == 16 else parts(quantize_nf4(dense), str(i))
        return {"x": normal(generator, tokens, k), **inputs}

    def packed(inputs: Inputs, i: int) -> NF4Tensor:
        return whole(inputs, k, k, str(i))

    def weight(inputs: Inputs, i: int) -> Tensor | NF4Tensor:
        return inputs[f"w{i}"] if bits == 16 else packed(inputs, i)

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        unpacked.forget()  # a forward finds its weights packed
        a, b = ([inputs[f"{name}{i}"] for i in range(layers)] for name in ("a", "b"))
        weights = [weight(inputs, i) for i in range(layers)]
        if layers == 1:
            return (lora_linear(inputs["x"], weights[0], None, a[0], b[0], scaling=SCALING),)
        return tuple(lora_linears(inputs["x"], weights, [None] * layers, a, b, scaling=SCALING))

    def beside(product: Callable[[Inputs, int], Tensor]) -> Call:
        """The frozen product of each layer, and the LoRA as peft adds it."""

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            outs = []
            for i in range(layers):
                side = F.linear(F.linear(inputs["x"], inputs[f"a{i}"]), inputs[f"b{i}"])
                outs.append(product(inputs, i) + side * SCALING)
            return tuple(outs)

        return call

    def product(inputs: Inputs, i: int) -> Tensor:
        return F.linear(inputs["x"], inputs[f"w{i}"]) if bits == 16 else linear_nf4(inputs["x"], packed(inputs, i))

    def exact(inputs: Inputs, i: int) -> Tensor:
        stored = weight(inputs, i)
        wide = stored.float() if isinstance(stored, Tensor) else dequantize_nf4_reference(stored, torch.float32)
        return F.linear(inputs["x"].float(), wide)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return beside(exact)({name: x.float() if name in ("x", *names) else x for name, x in inputs.items()})

    def bound(inputs: Inputs) -> Inputs:
        return inputs | {"calls": [bitsandbytes_linear(packed(inputs, i)) for i in range(layers)]}

    of_bits = {
        16: Variant("compile", lambda: compiled(beside(product)), quick=False),
        4: Variant(
            "bitsandbytes",
            lambda: beside(lambda inputs, i: inputs["calls"][i](inputs["x"])),
            package="bitsandbytes",
            prepare=bound,
        ),
    }
    ours = Variant("nibble", lambda: nibble if bits == 16 else require_csrc(nibble))
    return Problem(
        draw=draw,
        differentiable=("x", *names),
        reference=reference,
        variants=(ours, Variant("torch", lambda: beside(product)), of_bits[bits]),
        cost=products(layers * tokens * k * (2 * k + 4 * rank), layers * tokens * k * (2 * k + 8 * rank)),
    )


BENCH = Bench("lora_linear", __doc__ or "", cases, problem, tiny={"T": 8, "K": 64, "r": 4})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
