"""Writing answers: the prompts are prefilled as one pack, then each step decodes one token a sequence.

Positions go on where the prompt ended (behind a modality token, which has position 0, text token j has j + 1). LaVIN's
own decoder restarts them one too low from the shortest prompt of the batch on; `legacy_positions` reproduces that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.data.packing import collate, form_of
from engine.data.sample import Sample
from engine.errors import UsageError
from models.cache import KVCache
from models.pack import Pack
from models.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen (temperature 0 takes the likeliest, else nucleus sampling), and LaVIN's defects."""

    max_new_tokens: int = 64
    temperature: float = 0.1
    top_p: float = 0.75
    legacy_positions: bool = False  # restart positions one too low from the batch's shortest prompt on
    legacy_clip_router: bool = False  # the batch's first sample routes all its pictures


def plan_batches(
    lengths: Sequence[int], sampling: Sampling, *, max_batch_size: int, tokens_per_batch: int
) -> list[list[int]]:
    """Which prompts of these lengths are written together.

    Longest first, as many as have room in `tokens_per_batch` at the length of the batch's longest, with what will be
    written: the places of its cache, which bound its prefill too. One prompt is a batch even where it has no room.
    LaVIN's defects depend on what is in a batch; they get LaVIN's, prompts that follow one another.
    """
    count = len(lengths)
    if sampling.legacy_positions or sampling.legacy_clip_router:
        return [list(range(i, min(i + max_batch_size, count))) for i in range(0, count, max_batch_size)]
    order = sorted(range(count), key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < count:
        room = tokens_per_batch // (lengths[order[start]] + sampling.max_new_tokens)
        size = max(1, min(room, max_batch_size))
        batches.append(order[start : start + size])
        start += size
    return batches


@torch.no_grad()
def generate(
    model: VisionLanguageModel, prompts: Sequence[Sample], tiles: Sequence[Tensor | None], *,
    sampling: Sampling, generator: torch.Generator, eos_id: int, device: torch.device, stop_ids: Sequence[int] = (),
) -> list[list[int]]:  # fmt: skip
    """Token ids that follow each prompt, up to the end-of-sequence token or one of `stop_ids`, which end it too.

    `prompts` are laid out as in training (no modality token); `tiles` holds each prompt's image fp32 [3, H, W] (several
    tiles: [n, 3, H, W]) or None. `generator` is on `device` and goes on from batch to batch.

    Raises:
        UsageError: legacy_positions for a model without a modality token.
    """
    weights = [torch.zeros(len(p.input_ids)) for p in prompts]
    routed_by = [0] * len(prompts) if sampling.legacy_clip_router else None
    pack = collate(prompts, weights, tiles, routed_by=routed_by, form=form_of(model.config)).to(device)
    lengths = [len(p.input_ids) for p in prompts]
    first = pack.modality_rows.numel()
    behind_prompt = int(first > 0)  # the position of a token behind a prompt of no tokens
    if sampling.legacy_positions:
        pack, behind_prompt = _legacy_positions(pack, lengths), behind_prompt - 1
    cache = _cache(model, pack, lengths, sampling.max_new_tokens, device)
    last = pack.segments.cu_seqlens[first + 1 : first + 1 + len(prompts)].long() - 1  # after the modality segments
    hidden = model.hidden(pack, cache=cache).index_select(0, last)
    cache.decoding = True

    router_row = torch.tensor([int(t is not None) for t in tiles], dtype=torch.int32, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ends_too = torch.tensor(stop_ids, dtype=torch.int64, device=device)
    written: list[Tensor] = []
    for left in reversed(range(sampling.max_new_tokens)):
        tokens = _choose(model.logits(hidden), sampling, generator)  # [B]
        tokens = torch.where(done | torch.isin(tokens, ends_too), eos_id, tokens)
        done |= tokens == eos_id
        if bool(done.all()):
            break
        written.append(tokens)
        if left == 0:
            break
        hidden = model.decode(tokens, (cache.lengths + behind_prompt).int(), router_row, cache)
    columns = torch.stack(written, dim=1).tolist() if written else [[] for _ in prompts]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in columns]


def _cache(
    model: VisionLanguageModel, pack: Pack, lengths: list[int], max_new_tokens: int, device: torch.device
) -> KVCache:
    batch_size, max_length = len(lengths), max(lengths) + max_new_tokens
    trash = batch_size * max_length
    slots = torch.full((pack.input_ids.numel(),), trash, dtype=torch.int64)
    start = pack.modality_rows.numel()
    for b, length in enumerate(lengths):
        slots[start : start + length] = b * max_length + torch.arange(length)
        start += length
    return KVCache(
        num_layers=model.config.language.num_layers, batch_size=batch_size, max_length=max_length,
        slots=slots.to(device), lengths=torch.tensor(lengths, device=device),
    )  # fmt: skip


def _legacy_positions(pack: Pack, lengths: list[int]) -> Pack:
    """Text token j has position j + 1 up to the shortest prompt of the batch, and j from there on."""
    if not pack.modality_rows.numel():
        raise UsageError(
            "legacy.decode_positions without MMA adapters in the language model", where="--legacy.decode_positions",
            why="the defect is one of positions behind LaVIN's modality token", do="leave it out",
        )  # fmt: skip
    positions = pack.segments.position_ids.clone()
    shortest, start = min(lengths), pack.modality_rows.numel()
    for length in lengths:
        positions[start + shortest : start + length] -= 1
        start += length
    return replace(pack, segments=replace(pack.segments, position_ids=positions))


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits fp32 [B, V] -> token ids [B]."""
    if sampling.temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before > sampling.top_p, 0.0)
    picked = torch.multinomial(ordered, 1, generator=generator)
    return ids.gather(-1, picked)[:, 0]
