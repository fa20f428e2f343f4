"""--memory_budget, --gradient_checkpointing: what the layers of a run keep for their backward pass.

What is free once weights, gradients and optimiser state are in place, less a reserve, is divided over the largest pack
that the run can meet (accounting.py counts it): first what there is no choice about, then what layers keep, by the
assignment of least recomputation that fits (activation_policy.py). What is left goes to unpacked copies of quantised
weights (--runtime.unpacked_memory auto): a byte of them saves less time than a byte kept for the backward pass.

    on a GPU    free: what the driver says, and at most --memory_budget with the CUDA context in it
    on a CPU    no limit, and nothing is counted; with --memory_budget that less what is there, in 32 bits

The choice changes no bit of a run's results. A plan makes it for cards that are not here (verdict.py), a run for its
own (engine/settle.py), a benchmark as a run would (benchmarks/engine_setting.py): all by these functions. Only torch
and numpy are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.config import Config, longest_sample
from engine.data.packing import form_of
from engine.data.padding import padded_segments, padded_tiles
from engine.data.planning import MODALITY_ROWS, MULTIPLE, most_tiles, own_rows, round_up
from engine.memory_size import gib, parse_size
from engine.pictures import anyres_of, in_order
from engine.plan.accounting import Costs, costs
from engine.plan.activation_policy import Layers, solve
from engine.plan.cards import CARDS, Card, card_named
from engine.plan.fixed_memory import bits_of
from engine.plan.meta_model import PackShape
from engine.plan.roofline import seconds
from engine.plan.unpacked_memory import asked_for, least_scratch
from engine.plan.workload import pairs_per_token
from kernels.counting import Op
from models.recompute import POLICIES, ActivationPolicy, Policy
from models.vlm import VisionLanguageModel, VLMConfig

RESERVE = 0.05  # of what is free: what the allocator loses between blocks, workspaces of libraries
CONTEXT_BYTES = 512 * 2**20  # CUDA context and the code of kernels, outside of the allocator
HOST = Card("CPU", memory=0, capability=0, rate=1e11, bandwidth=1e10)  # to compare recomputations: any one
COUNTED_ON = CARDS[-1].capability  # bytes and ops are the same on every card, so one count serves all; times are not


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What was chosen, and why."""

    policy: ActivationPolicy
    spare: int  # bytes that nothing needs: for --runtime.unpacked_memory auto
    why: str
    fits: bool = True  # as predicted


def choose(
    config: Config, model: VisionLanguageModel, free: int | None, card: Card | None, dtype: torch.dtype
) -> MemoryChoice:
    """What the layers of `model` keep where `free` bytes are there for it and for buffers; None: any number.

    Where nothing fits it is the leanest choice.

    Args:
        model: on any device, the meta device too: shapes are all that counts.
        card: whose times are compared; None: a CPU.
        dtype: of activations.
    """
    num_language, num_vision = len(model.language.layers), len(model.vision.layers)
    if config.gradient_checkpointing:
        leanest = ActivationPolicy.uniform("keep_input", num_language, num_vision)
        return MemoryChoice(leanest, 0, "--gradient_checkpointing")
    if free is None:
        everything = ActivationPolicy.uniform("save_all", num_language, num_vision)
        return MemoryChoice(everything, 0, "on a CPU, without --memory_budget")
    found = counted(config, model, dtype, on_cuda=card is not None)
    copies = asked_for(config, model.language, dtype.itemsize, on_cuda=card is not None)
    budget = free - found.inputs - found.buffers - copies
    solution = solve(_stages(found, rates(card, dtype)), found.after, budget)
    vision, language = solution.policies
    why = (
        f"a pack of {largest_pack(config, model.config).tokens:,} tokens is predicted to take {gib(solution.peak)}, "
        f"{gib(max(0, budget))} are free"
        + (f"; {1000 * solution.seconds:.0f} ms of recomputation" if solution.seconds else "")
    )
    policy = ActivationPolicy(language=language, vision=vision)
    return MemoryChoice(policy, max(0, budget - solution.peak), why, solution.fits)


def counted(config: Config, model: VisionLanguageModel, dtype: torch.dtype, *, on_cuda: bool) -> Costs:
    """What the largest pack of a run takes. `model` as in `choose`."""
    scratch = least_scratch(config, model.language, dtype.itemsize, on_cuda=on_cuda)
    shape = largest_pack(config, model.config)
    return costs(model.config, bits_of(config), shape, dtype, COUNTED_ON, scratch=scratch)


def largest_pack(config: Config, model: VLMConfig) -> PackShape:
    """The largest pack that a run can meet (engine/data/planning.py), padded as for CUDA graphs (padding.py), with
    every row supervised: as many tokens as asked for, or those of the longest sample, and never more than a step has.
    Segments: of all samples of a step, which may be so short that one pack has them all. Tiles: no more than their
    tokens have room for; with anyres those of the images that have most."""
    longest, samples, form = longest_sample(config), config.optim.samples_per_step(1), form_of(model)
    asked, most = config.runtime.tokens_per_batch, longest - form.modality  # a modality token is in a row of its own
    own, modality_rows = own_rows(modality=form.modality), MODALITY_ROWS * form.modality
    tokens = max(asked // MULTIPLE * MULTIPLE, round_up(own + most))
    tokens = min(tokens, round_up(own + samples * most))
    anyres = anyres_of(config, model)
    each = 1 if anyres is None else anyres.most_tiles()
    tiles = min(max(most_tiles(asked), each), samples * each)
    if anyres is None:
        tiles = min(tiles, max(1, (tokens - own) // form.tile_tokens))
    return PackShape(
        tokens=tokens,
        supervised=tokens,
        segments=padded_segments(modality_rows + min(samples, tokens) + 1),  # the last: what fills the pack up
        tiles=padded_tiles(tiles, tokens, form.tile_tokens),
        pairs=tokens * pairs_per_token(longest, form.tile_tokens if anyres is None else anyres.most_tokens()),
        longest=longest,
        slots=None if in_order(config, model) else tokens,
        image_tokens=form.tile_tokens if anyres is None else anyres.most_tokens(),
        image_tiles=each,
    )


def free_bytes(config: Config, resident: int, memory: int | None) -> int | None:
    """Bytes that are free for a pass over a pack; None: any number.

    Args:
        resident: bytes that are taken for good: weights, gradients, optimiser state, on a GPU the CUDA context.
        memory: bytes that the run may have in all, `resident` among them; None: a CPU's, which has no limit.
    """
    asked = parse_size(config.memory_budget) if config.memory_budget else None
    if memory is None:
        return None if asked is None else asked - resident
    limit = memory if asked is None else min(memory, asked)
    return int((limit - resident) * (1 - RESERVE))


def resident_bytes(model: VisionLanguageModel, state: Mapping[str, Tensor]) -> int:
    """Bytes of weights, gradients and optimiser state (by name; empty: there is none), each memory once."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    tensors = (*model.parameters(), *model.buffers(), *gradients, *state.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process has of a GPU, CUDA context included, and those that it may have in all."""
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    idle = free + torch.cuda.memory_reserved(device) - allocated
    return allocated + CONTEXT_BYTES, allocated + CONTEXT_BYTES + idle


def card_of(device: torch.device) -> Card | None:
    """What is known of a GPU; one that is not in the table counts as the nearest one by compute capability. None: it is
    none."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return card_named(torch.cuda.get_device_name(device)) or min(
        CARDS, key=lambda card: abs(card.capability - capability)
    )


def rates(card: Card | None, dtype: torch.dtype) -> Card:
    """The card as a run in this dtype finds it; None: a CPU."""
    if card is None:
        return HOST
    return card.in_fp32() if dtype == torch.float32 else card


def _stages(found: Costs, card: Card) -> list[Layers]:
    """Tower and language model, with this card's times."""
    return [
        _timed(found.vision, found.vision_work.backward, card, narrow=True),
        _timed(found.language, found.language_work.backward, card, narrow=False),
    ]


def _timed(layers: Layers, backward: Mapping[Policy, Sequence[Op]], card: Card, *, narrow: bool) -> Layers:
    times = {policy: seconds(backward[policy], card, narrow=narrow) for policy in POLICIES}
    choices = {
        policy: replace(choice, seconds=max(0.0, times[policy] - times["save_all"]))
        for policy, choice in layers.choices.items()
    }
    return replace(layers, choices=choices)
