"""Rotary embedding of q and k in place, by position ids, full and partial (goal G6).

r of a head's d channels turn: all of LLaMA's 128, 32 of Phi-2's 80, 16 of StableLM's 64. Half-split pairs, as in
Hugging Face's models, so that Liger can take part; it and torch get cos and sin of every token, gathered beforehand
(a model does that once for all layers), ours reads the table. Least bytes: the turning channels of q and k, read and
written, a position id of 4 bytes a token, and once each row of the fp32 table that some token needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import command, lengths
from benchmarks.lanes import activation
from benchmarks.problem import Bench, Call, Case, Cost, Inputs, Problem, Variant, compiled, normal
from kernels.rope import rope, rope_table


def cases() -> list[Case]:
    full = [Case("rope", {"T": tokens, "H": 32, "d": 128, "r": 128}) for tokens in (512, 2048, 8192)]
    partial = [Case("rope", {"T": 2048, "H": 32, "d": d, "r": r}) for d, r in ((80, 32), (64, 16))]
    return [*full, *partial]


def problem(case: Case, device: torch.device) -> Problem:
    tokens, heads, d, r = (case.shape[key] for key in ("T", "H", "d", "r"))
    samples = lengths.pack(tokens)
    packed = torch.tensor(lengths.positions(samples), dtype=torch.int32, device=device)
    cos, sin = rope_table(r, lengths.LONGEST, 10000.0, device)

    def draw(generator: torch.Generator) -> Inputs:
        q, k = normal(generator, tokens, heads, d), normal(generator, tokens, heads, d)
        of_token = {"cos": cos[packed].repeat(1, 2).bfloat16(), "sin": sin[packed].repeat(1, 2).bfloat16()}  # [T, r]
        return {"q": q, "k": k, **of_token}

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k = activation(inputs["q"]), activation(inputs["k"])
        return tuple(rope(q, k, cos, sin, packed, interleaved=False, inplace=True))

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        table = cos[packed].repeat(1, 2), sin[packed].repeat(1, 2)
        return _turn(inputs["q"], *table, r), _turn(inputs["k"], *table, r)

    def expression(q: Tensor, k: Tensor, of_cos: Tensor, of_sin: Tensor) -> tuple[Tensor, Tensor]:
        return _turn(q, of_cos, of_sin, r), _turn(k, of_cos, of_sin, r)

    once = 2 * 2 * tokens * heads * r * 2 + 4 * tokens + max(samples) * r * 4  # cos and sin [P, r / 2], fp32
    return Problem(
        draw=draw,
        differentiable=("q", "k"),
        reference=reference,
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("torch", lambda: _unpacked(expression)),
            Variant("compile", lambda: _unpacked(compiled(expression)), quick=False),
            Variant("liger", _liger, package="liger-kernel"),
        ),
        cost={"forward": Cost(bytes=once), "backward": Cost(bytes=once), "full": Cost(bytes=2 * once)},
    )


def _turn(x: Tensor, cos: Tensor, sin: Tensor, r: int) -> Tensor:
    """As Hugging Face's models write it: x [T, H, d], cos and sin [T, r]."""
    turning, passing = x[..., :r], x[..., r:]
    a, b = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]
    return torch.cat((turned, passing), dim=-1) if passing.shape[-1] else turned


def _unpacked(function: Callable[..., Any]) -> Call:
    return lambda inputs: function(inputs["q"], inputs["k"], inputs["cos"], inputs["sin"])


def _liger() -> Call:
    from liger_kernel.ops import LigerRopeFunction

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k = (inputs[name][None].transpose(1, 2) for name in ("q", "k"))  # [1, H, T, d], as in Hugging Face's models
        turned = LigerRopeFunction.apply(q, k, inputs["cos"][None], inputs["sin"][None])
        return tuple(x.transpose(1, 2)[0] for x in turned)

    return call


BENCH = Bench("rope", __doc__ or "", cases, problem, tiny={"T": 50, "H": 2})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
