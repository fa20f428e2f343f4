"""Decoding token by token gives what one pass over all tokens gives, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.adapters.lora import LoRA, LoRAConfig
from models.adapters.mma import AdapterConfig, MMAdapter
from models.cache import KVCache
from models.language.decoder import Context, Decoder
from models.pack import Segments
from tests.models.drawn import drawn
from tests.models.language.small import CONFIGS, CPU, LENGTHS, context, decoder, stream, x_of

PREFILLED = (2, 1)  # tokens of each sequence
LONGEST = max(LENGTHS)


def segments_of(positions: list[Tensor]) -> Segments:
    lengths = torch.tensor([0, *(len(each) for each in positions)], dtype=torch.int32)
    rows = torch.repeat_interleave(lengths[1:]).int()
    return Segments(
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32), max_seqlen=int(lengths.max()),
        position_ids=torch.cat(positions).int(), router_row=rows,
    )  # fmt: skip


def run(model: Decoder, x: Tensor, segments: Segments, router_rows: Tensor | None, cache: KVCache) -> Tensor:
    of = Context(segments=segments, router_rows=router_rows, rope=model.rope_table(LONGEST, CPU), seed=None)
    delta: Tensor | None = None
    for layer, kept in zip(model.blocks(), cache.layers, strict=True):
        x, delta = layer(x, delta, of, kept)
    assert delta is not None
    return x + delta


@pytest.mark.parametrize("policy", ["save_all", "keep_input"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_is_the_prefill(name: str, policy: str) -> None:
    """Two sequences of 6 and 3 tokens, 2 and 1 of them prefilled; Phi-3's window is 3."""
    model = decoder(replace(CONFIGS[name], residual_dropout=0.4))
    model.add_adapters(AdapterConfig(), "attn", 0)
    model.add_lora(LoRAConfig(rank=2), 1 << 18)
    for module in model.modules():
        if isinstance(module, MMAdapter | LoRA):
            drawn(module)
            for parameter in module.parameters():
                parameter.mul_(0.3)
    for layer in model.blocks():
        layer.policy = policy  # type: ignore[assignment]
    x = x_of().detach()
    expected = stream(model, x, context(model)).split(LENGTHS)
    sequences = x.split(LENGTHS)

    slots = torch.tensor([0, 1, LONGEST])  # of the prefilled rows in [2, LONGEST]
    cache = KVCache(len(model.blocks()), 2, LONGEST, slots, torch.tensor(PREFILLED))
    first = [part[:n] for part, n in zip(sequences, PREFILLED, strict=True)]
    prefill = segments_of([torch.arange(n) for n in PREFILLED])
    out = run(model, torch.cat(first), prefill, torch.tensor([0, PREFILLED[0]]), cache)
    found = [[part] for part in out.split(PREFILLED)]
    cache.decoding = True
    for step in range(LONGEST - PREFILLED[0]):
        at = [n + step for n in PREFILLED]
        rows = torch.stack([part[min(i, len(part) - 1)] for part, i in zip(sequences, at, strict=True)])
        out = run(model, rows, segments_of([torch.tensor([i]) for i in at]), None, cache)
        cache.lengths += 1
        for b, row in enumerate(out):
            found[b].append(row[None])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(a)[: len(b)], b, rtol=1e-5, atol=1e-5)
