"""Head and cross-entropy with a frozen head, where only a share of the tokens is supervised (goal G9).

Every variant gets the hidden states of all T tokens and labels that are -100 where a token is no target, and reduces
to the mean; ours picks the supervised rows first, which is timed with it. share=1 is the op alone: all rows count and
nothing is picked. Least operations, for the L supervised rows: 2 L V D forward and as many for dX. gemms is the floor:
these two products and nothing else.
"""

from __future__ import annotations

import inspect
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.problem import Bench, Call, Case, Cost, Inputs, Problem, Variant, compiled, normal
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

IGNORE = -100
BUDGET = 256 * 2**20  # bytes of logits at once: our default


def cases() -> list[Case]:
    """LLaMA's vocabulary at every size; Phi-2's and LLaMA-3's beside it."""

    def case(tokens: int, share: float, vocabulary: int, width: int, quick: bool = True) -> Case:
        shape = {"T": tokens, "share": share, "V": vocabulary, "D": width}
        return Case("linear_cross_entropy", shape, modes=("full",), quick=quick)

    llama = [case(tokens, share, 32000, 4096) for share in (0.4, 0.7) for tokens in (512, 2048, 8192)]
    alone = [case(8192, 1.0, 32000, 4096), case(2048, 1.0, 128256, 4096)]
    others = [case(8192, 0.7, 51200, 2560, False), case(8192, 0.7, 128256, 4096, False)]
    return [*llama, *alone, *others]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, share, vocabulary, width = (case.shape[key] for key in ("T", "share", "V", "D"))
    count = round(tokens * share)
    head = normal(torch.Generator(device).manual_seed(1), vocabulary, width, scale=0.02)

    def draw(generator: torch.Generator) -> Inputs:
        supervised = torch.randperm(tokens, generator=generator, device=device)[:count].sort().values
        targets = torch.randint(vocabulary, (count,), generator=generator, device=device)
        return {
            "hidden": normal(generator, tokens, width), "head": head, "supervised": supervised, "targets": targets,
            "labels": torch.full((tokens,), IGNORE, device=device).index_copy_(0, supervised, targets),
            "weights": torch.full((count,), 1.0 / count, device=device),
        }  # fmt: skip

    def picked(inputs: Inputs) -> Tensor:
        hidden: Tensor = inputs["hidden"]
        return hidden if count == tokens else hidden.index_select(0, inputs["supervised"])

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        rows = (inputs["head"], inputs["targets"], inputs["weights"])
        return (linear_cross_entropy(picked(inputs), *rows, memory_budget=BUDGET),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        rows = (inputs["head"], inputs["targets"], inputs["weights"])
        return (linear_cross_entropy_reference(picked(inputs), *rows),)

    def gemms(inputs: Inputs) -> tuple[Tensor, ...]:
        rows = inputs["hidden"][:count]
        return (rows @ inputs["head"].T @ inputs["head"],)

    return Problem(
        draw=draw,
        differentiable=("hidden",),
        reference=reference,
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("torch", lambda: _torch),
            Variant("compile", lambda: compiled(_torch), quick=False),
            Variant("liger", lambda: _liger(tokens, vocabulary, width, False), package="liger-kernel"),
            Variant(
                "liger_default", lambda: _liger(tokens, vocabulary, width, True), package="liger-kernel", quick=False
            ),
            Variant("cce", lambda: _cce("cce"), package="cut-cross-entropy"),
            Variant("cce_compile", lambda: _cce("torch_compile"), package="cut-cross-entropy", quick=False),
            Variant("gemms", lambda: gemms, floor=True),
        ),
        cost={"full": Cost(flops=4 * count * vocabulary * width)},
    )


def _torch(inputs: Inputs) -> tuple[Tensor, ...]:
    """All logits at once, as Hugging Face's models do it."""
    logits = F.linear(inputs["hidden"], inputs["head"]).float()
    return (F.cross_entropy(logits, inputs["labels"], ignore_index=IGNORE),)


def _liger(tokens: int, vocabulary: int, width: int, default: bool) -> Call:
    """With chunks as large as our budget allows, where its version has that setting, or as it comes."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

    settings = list(inspect.signature(Fused.forward).parameters.values())[4:]  # after ctx, input, weight, target
    factor = 1
    while (
        not default and factor < 64 and liger_rows(tokens, vocabulary, width, 2 * factor) <= BUDGET // 2 // vocabulary
    ):
        factor *= 2
    options = [factor if setting.name == "chunk_mem_const" else setting.default for setting in settings]

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        loss = Fused.apply(inputs["hidden"], inputs["head"], inputs["labels"], *options)
        return (loss[0] if isinstance(loss, tuple) else loss,)

    return call


def liger_rows(tokens: int, vocabulary: int, width: int, factor: int) -> int:
    """Rows of a chunk of Liger 0.8 with chunk_mem_const = factor; their 16-bit logits exist at once."""
    chunks = -(-vocabulary // (factor * width))
    return min(tokens, 1 << (-(-tokens // chunks) - 1).bit_length())


def _cce(implementation: str) -> Call:
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda inputs: (cut(inputs["hidden"], inputs["head"], inputs["labels"], impl=implementation),)


BENCH = Bench(
    "linear_cross_entropy", __doc__ or "", cases, problem, tiny={"T": 40, "V": 96, "D": 32}
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
