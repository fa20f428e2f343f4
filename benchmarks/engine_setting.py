"""What a run of the engine would settle about memory, for a model that has no recipe (engine/plan/memory_budget.py
reads a configuration): which activations are kept, of how many layers the weights are kept unpacked, what is predicted.

The counting, the solver and the roofline are the engine's own. Copies are made where the engine chooses the policy
("auto") and memory is left; a policy that is asked for comes without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from engine.data.packing import filled_tokens
from engine.data.planning import most_tiles, round_up
from engine.plan.accounting import Costs, costs
from engine.plan.activation_policy import solve
from engine.plan.cards import CARDS, Card, card_named
from engine.plan.meta_model import Bits, PackShape
from engine.plan.roofline import seconds
from kernels import unpacked
from models.linear import pack_of
from models.pack import Pack
from models.recompute import ActivationPolicy, check_policy
from models.vlm import VisionLanguageModel, VLMConfig

RESERVE = 0.05  # of what is free, as in engine/plan/memory_budget.py
OPTIMIZER_BYTES = 12  # a trained parameter: gradient and both moments, which are not there yet


@dataclass(frozen=True, slots=True)
class Setting:
    """What was settled; predictions are None where there is no card to speak about."""

    policy: ActivationPolicy
    copied_layers: int = 0
    plan_bytes: int | None = None  # of torch's allocator, at the peak
    plan_tokens_per_s: float | None = None

    def use(self, vlm: VisionLanguageModel) -> None:
        """Of this process: layers keep what the policy says, copies are made."""
        vlm.use_activation_policy(self.policy)
        blocks = vlm.language.blocks()
        for block in blocks[len(blocks) - self.copied_layers :]:
            for group in block.groups():
                unpacked.keep(pack_of(group), vlm.language.embed.weight.dtype)

    def fields(self) -> dict[str, Any]:
        """Of a row."""
        return {
            "policy": self.policy.describe(), "setting": f"{self.copied_layers} layers kept unpacked",
            "plan_bytes": self.plan_bytes, "plan_tokens_per_s": self.plan_tokens_per_s,
        }  # fmt: skip


def choose(
    vlm: VisionLanguageModel, wanted: str, tokens: int, packs: Sequence[Pack], free: int, card: Card | None,
    dtype: torch.dtype, resident: int,
) -> Setting:  # fmt: skip
    """What the engine would settle for packs of at most `tokens`.

    Args:
        wanted: a policy for all layers, or "auto".
        packs: those that will be run: what is predicted is for the largest of them.
        free: bytes for optimizer, activations, buffers and copies; read where the policy is "auto".
        card: None: nothing is counted, and "auto" keeps everything, as the engine does on a CPU.
        resident: bytes of the model.
    """
    layers = len(vlm.language.blocks()), len(vlm.vision.blocks())
    uniform = ActivationPolicy.uniform(check_policy("save_all" if wanted == "auto" else wanted), *layers)
    if card is None:
        return Setting(uniform)
    bits = Bits(layers=4)
    trained = OPTIMIZER_BYTES * sum(p.numel() for p in vlm.trainable().values())
    policy, copied = uniform, 0
    if wanted == "auto":
        largest = counted(vlm.config, bits, largest_pack(tokens, packs), dtype, card)
        budget = free - trained - largest.inputs - largest.buffers
        solution = solve(largest.stages, largest.after, budget)
        vision, language = solution.policies
        policy = ActivationPolicy(language, vision)
        copied = max(0, min(layers[0], (budget - solution.peak) // unpacked_bytes(vlm, dtype)))
    largest_run = max(packs, key=lambda pack: pack.input_ids.numel())
    run = counted(vlm.config, bits, shape_of(largest_run), dtype, card)
    copies = copied * unpacked_bytes(vlm, dtype)
    return Setting(
        policy, copied,
        plan_bytes=resident + trained + run.inputs + run.buffers + run.peak(policy) + copies,
        plan_tokens_per_s=filled_tokens(largest_run) / pass_seconds(run, policy, copied, card),
    )  # fmt: skip


def pass_seconds(run: Costs, policy: ActivationPolicy, copied: int, card: Card) -> float:
    """Predicted time of a pack, forward and backward, on the engine's roofline."""
    tower, language = run.vision_work, run.language_work
    time = seconds(run.other_work, card)
    time += sum(seconds((*tower.forward, *tower.backward[keeps]), card, narrow=True) for keeps in policy.vision)
    for index, keeps in enumerate(policy.language):
        ops = (*language.forward, *language.backward[keeps])
        if index >= len(policy.language) - copied:
            ops = tuple(op for op in ops if not op.name.startswith("dequantize"))
        time += seconds(ops, card)
    return time


@cache
def counted(config: VLMConfig, bits: Bits, shape: PackShape, dtype: torch.dtype, card: Card) -> Costs:
    return costs(config, bits, shape, dtype, card)


def largest_pack(tokens: int, packs: Sequence[Pack]) -> PackShape:
    """The largest pack that such a run could meet: full, every row supervised, as many tiles as it may have."""
    longest = max(pack.segments.max_seqlen for pack in packs)
    total = max(round_up(tokens), *(pack.input_ids.numel() for pack in packs))
    multiple = max(2, -(-total // 1024))
    return PackShape(
        tokens=total, supervised=total, segments=16 * -(-total // 2048),
        tiles=-(-most_tiles(tokens) // multiple) * multiple, pairs=total * longest // 4, longest=longest,
    )  # fmt: skip


def shape_of(pack: Pack) -> PackShape:
    lengths = pack.segments.cu_seqlens.diff().long()
    return PackShape(
        tokens=pack.input_ids.numel(), supervised=pack.supervised.numel(), segments=lengths.numel(),
        tiles=0 if pack.tiles is None else pack.tiles.shape[0], pairs=int((lengths**2).sum()) // 2,
        longest=pack.segments.max_seqlen,
    )  # fmt: skip


def unpacked_bytes(vlm: VisionLanguageModel, dtype: torch.dtype) -> int:
    """Of one layer of the language model."""
    linears = [linear for group in vlm.language.blocks()[0].groups() for linear in group]
    return sum(linear.in_features * linear.out_features for linear in linears) * dtype.itemsize


def card_and_memory(cap: int, device: torch.device) -> tuple[Card | None, int]:
    """The card, or the one in the engine's table that comes nearest (None: there is none), and the bytes that a run may
    still take of it. `cap`: a limit on all that torch takes; 0: none."""
    if device.type != "cuda":
        return None, 0
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    idle = free + torch.cuda.memory_reserved(device) - allocated
    idle = min(idle, cap - allocated) if cap else idle
    major, minor = torch.cuda.get_device_capability(device)
    nearest = min(CARDS, key=lambda card: abs(card.capability - 10 * major - minor))
    return card_named(torch.cuda.get_device_name(device)) or nearest, int(idle * (1 - RESERVE))
