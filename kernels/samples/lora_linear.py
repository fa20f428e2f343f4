"""Calls of kernels/lora_linear.py."""

from __future__ import annotations

from collections.abc import Iterator

import kernels.lora_linear  # noqa: F401 (registers the primitives)
from kernels.samples import Call, Draw

DROPOUT, SITE = 0.05, 3


def calls(draw: Draw, tokens: int, width: int) -> Iterator[Call]:
    """Inputs of `width` channels. Ranks of Imp's recipes (256) and of Bunny's and LLaVA's (128), small ones."""
    x, seed = draw(tokens, width), draw.below(1 << 31, 1)
    ranks = (("3 of rank 256", 3, 256), ("3 of rank 128", 3, 128), ("2 of rank 64", 2, 64), ("rank 8", 1, 8))
    for about, adapters, rank in ranks:
        a, code = draw(adapters * rank, width), draw(tokens, adapters * rank)
        masks = (adapters, DROPOUT, seed, SITE)
        yield Call("lora_down", (x, a, *masks), about)
        yield Call("lora_update_", (draw(tokens, width), code, a, *masks), about)
        yield Call("lora_outer", (code, x, *masks), about)
        yield Call("lora_outer", (code[:, :rank], x, 1, 0.0, None, 0), f"no dropout, {about}")
