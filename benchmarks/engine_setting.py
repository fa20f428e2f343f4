"""What a run of the engine settles about memory, for the benchmarks' models, and what the plan predicts of such a run.

A benchmark has no command line: the configuration that stands for it is made here, and what follows from it is the
engine's own doing, as for any run: what layers keep, the buffer and the copies of unpacked weights, the plan. A row
records what ran (`Setting.ran`), so that it can be predicted anew by a later plan (plan_check.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import mean
from typing import Any

import torch

from engine.config import Config
from engine.plan.accounting import costs
from engine.plan.cards import Card
from engine.plan.fixed_memory import bits_of
from engine.plan.memory_budget import COUNTED_ON, card_of, choose, device_memory, free_bytes, rates
from engine.plan.meta_model import PackShape
from engine.plan.speed import pass_seconds
from engine.plan.unpacked_memory import Share, share_of, share_text, use_memory
from engine.plan.verdict import Planner
from models.pack import Pack
from models.recompute import ActivationPolicy, check_policy
from models.vlm import VisionLanguageModel, VLMConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """What was settled."""

    config: Config
    policy: ActivationPolicy
    share: Share  # of the memory for unpacked weights
    dtype: torch.dtype  # of activations

    def ran(self, packs: Sequence[Pack], tokens: int) -> dict[str, Any]:
        """What a prediction needs beside model, dtype and card. `packs`: as they ran, `tokens`: of samples in them."""
        return {
            "bits": list(astuple(bits_of(self.config))), "policy": self.policy.to_json(),
            "scratch": self.share.scratch, "copies": self.share.copies, "copied_layers": self.share.num_copied,
            "packs": [list(astuple(shape_of(pack))) for pack in packs], "tokens": tokens,
        }  # fmt: skip

    def fields(self, model: VLMConfig, packs: Sequence[Pack], tokens: int, device: torch.device) -> dict[str, Any]:
        """Of a row; predicted is what runs on a GPU."""
        ran, card = self.ran(packs, tokens), card_of(device)
        found = None if card is None else predict(model, ran, self.dtype, card)
        return {
            "policy": self.policy.describe(), "setting": share_text(self.share, len(self.policy.language)), "ran": ran,
            "plan_bytes": None if found is None else found.bytes,
            "plan_tokens_per_s": None if found is None else found.tokens_per_s,
        }  # fmt: skip


def configuration(wanted: str, tokens: int, samples: int, longest: int, cap: int) -> Config:
    """Of a run with packs of at most `tokens` and steps of so many samples. `wanted`: a policy for all layers, or
    "auto"; `cap`: GB, 0: none."""
    config = Config(bits="4bit", gradient_checkpointing=wanted == "keep_input", memory_budget=f"{cap}GB" if cap else "")
    config.runtime.tokens_per_batch, config.optim.batch_size = tokens, samples
    config.dataset.max_seq_len = longest + 1  # which counts the modality token
    return config


def settle(config: Config, vlm: VisionLanguageModel, wanted: str, device: torch.device) -> Setting:
    """Does what a run does once weights, gradients and optimiser have their memory: layers keep what was chosen, copies
    are made. A policy that no flag asks for is set as it is, and leaves nothing for copies."""
    dtype = vlm.language.embed.weight.dtype
    if wanted in ("auto", "keep_input"):
        free = free_bytes(config, *device_memory(device)) if device.type == "cuda" else None
        choice = choose(config, vlm, free, card_of(device), dtype)
        policy, spare = choice.policy, choice.spare
    else:
        layers = len(vlm.language.layers), len(vlm.vision.layers)
        policy, spare = ActivationPolicy.uniform(check_policy(wanted), *layers), 0
    vlm.use_activation_policy(policy)
    share = share_of(config, vlm.language, dtype.itemsize, on_cuda=device.type == "cuda", spare=spare)
    assert share is not None  # layers are quantised
    use_memory(config, vlm.language, device, dtype, spare)
    return Setting(config, policy, share, dtype)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of the plan, for what ran."""

    bytes: int  # of torch's allocator, at the peak
    tokens_per_s: float  # of samples


def predict(model: VLMConfig, ran: Mapping[str, Any], dtype: torch.dtype, card: Card) -> Prediction:
    """By the plan's own accounting, for the packs that ran: memory for the largest of them, speed for their mean."""
    layers, head, vision = (f"{bits}bit" for bits in ran["bits"])
    config = Config(bits=layers, bits_head=head, bits_vision=vision)  # type: ignore[arg-type]
    policy = ActivationPolicy.from_json(ran["policy"])
    share = Share(ran["scratch"], ran["copies"], ran["copied_layers"], "as it ran")
    shapes = [PackShape(*sizes) for sizes in ran["packs"]]
    largest = max(shapes, key=lambda shape: (shape.tokens, shape.tiles, shape.supervised))
    planner = Planner(model, num_ranks=1, dtype=dtype, on_cuda=False)  # torch's allocator does not have the context
    bits = bits_of(config)
    found = costs(model, bits, largest, dtype, COUNTED_ON, scratch=share.scratch)
    memory = planner.memory(config, found, policy, share)

    middle = replace(
        largest,
        tokens=round(mean(shape.tokens for shape in shapes)),
        supervised=round(mean(shape.supervised for shape in shapes)),
        pairs=round(mean(shape.pairs for shape in shapes)),
    )
    images = mean(shape.tiles for shape in shapes) / largest.tiles if largest.tiles else 0.0
    found = costs(model, bits, middle, dtype, COUNTED_ON, scratch=share.scratch)
    seconds = pass_seconds(found, policy, rates(card, dtype), copied_layers=share.num_copied, images=images)
    return Prediction(memory["total"], ran["tokens"] / (len(shapes) * seconds))


def shape_of(pack: Pack) -> PackShape:
    """Of a pack on the CPU."""
    lengths = pack.segments.cu_seqlens.diff().long()
    return PackShape(
        tokens=pack.input_ids.numel(), supervised=pack.supervised.numel(), segments=lengths.numel(),
        tiles=0 if pack.tiles is None else pack.tiles.shape[0], pairs=int((lengths**2).sum()) // 2,
        longest=pack.segments.max_seqlen,
    )  # fmt: skip
