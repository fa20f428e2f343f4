"""Card by card: does a run fit, with which activation policy, how fast? What helps where it does not: remedies.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from engine.config import Config
from engine.data.planning import most_tiles
from engine.memory_size import parse_size
from engine.pictures import in_order
from engine.plan.accounting import Costs, costs
from engine.plan.cards import Card
from engine.plan.fixed_memory import bits_of, frozen_bytes, parameters_by_part, training_bytes
from engine.plan.memory_budget import (
    CONTEXT_BYTES,
    COUNTED_ON,
    MemoryChoice,
    choose,
    counted,
    free_bytes,
    largest_pack,
)
from engine.plan.meta_model import META, largest_tower_group
from engine.plan.speed import Speed, predicted
from engine.plan.unpacked_memory import Share, share_of
from engine.plan.workload import typical_pack
from engine.tower_cache import keeps_features, most_bytes
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel, VLMConfig

Memory = dict[str, int]  # bytes by part
Remedies = Callable[["Planner", Config, Card], Iterable[tuple[str, ...]]]
SAME_SPEED = 0.9  # packs that are nearly as large as the largest are as fast a token


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a card does with a run. All predicted."""

    card: str
    fits: bool  # with the reserve that a run leaves
    policy: str  # which layers keep what
    copied_layers: int  # of the language model, that are kept unpacked too
    peak_bytes: int
    within_budget: bool  # the limit is --memory_budget, not the card
    limit_bytes: int  # that the run may take, its reserve included
    memory_bytes: Memory  # by part
    samples_per_second: float
    tokens_per_second: float
    hours: float | None  # of the whole run; None where the number of samples is unknown
    remedy: str  # flags with which it fits; empty where it fits, or where nothing helps


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a run would be on a card."""

    policy: ActivationPolicy
    copied_layers: int
    memory: Memory  # with the sum as "total"
    fits: bool


class Planner:
    """Plans one model under changing configurations."""

    def __init__(self, model_config: VLMConfig, *, num_ranks: int, dtype: torch.dtype, on_cuda: bool) -> None:
        self.model_config, self.num_ranks, self.dtype, self.on_cuda = model_config, num_ranks, dtype, on_cuda
        with META:
            self.model = VisionLanguageModel(model_config)
        self.parameters = parameters_by_part(self.model)
        self.trainable = sum(p.numel() for p in self.model.trainable().values())

    def costs(self, config: Config) -> Costs:
        """Of the largest pack that the run can meet."""
        return counted(config, self.model, self.dtype, on_cuda=self.on_cuda)

    def fixed(self, config: Config) -> Memory:
        """Bytes of all that is there before a pack."""
        memory = frozen_bytes(self.model, bits_of(config), self.dtype.itemsize)
        memory |= training_bytes(self.model, self.num_ranks)
        if keeps_features(self.model.vision, self.dtype.itemsize) and in_order(config, self.model_config):
            most_new = most_tiles(config.runtime.tokens_per_batch)  # how many images there are is not known here
            memory["image features"] = most_bytes(self.model_config.vision, self.dtype.itemsize, most_new)
        if self.on_cuda:
            memory["cuda context"] = CONTEXT_BYTES
        return memory

    def free(self, config: Config, card: Card) -> int | None:
        """Bytes for a pack and for copies of weights, as a run counts them; None: any number."""
        memory = card.memory if self.on_cuda else None
        return free_bytes(config, sum(self.fixed(config).values()), memory)

    def choice(self, config: Config, card: Card) -> MemoryChoice:
        """What a run chooses on this card, and off a GPU."""
        known = self._as_computed(card) if self.on_cuda else None
        return choose(config, self.model, self.free(config, card), known, self.dtype)

    def on(self, config: Config, card: Card, choice: MemoryChoice | None = None) -> Outlook:
        """This configuration on a card: with the best choice for it, or the one that a run has made."""
        choice = self.choice(config, card) if choice is None else choice
        share, free = self._share(config, choice), self.free(config, card)
        memory = self.memory(config, self.costs(config), choice.policy, share)
        fits = free is None or memory["total"] - sum(self.fixed(config).values()) <= free
        return Outlook(choice.policy, 0 if share is None else share.num_copied, memory, fits)

    def memory(self, config: Config, found: Costs, policy: ActivationPolicy, share: Share | None) -> Memory:
        """Bytes by part, of a pack that costs what was found, with the sum as "total"."""
        vision, language = found.saved(policy)
        memory = self.fixed(config) | {
            "dequantisation buffer": self._buffer(config, found, share),
            "unpacked copies": 0 if share is None else share.copies,
            "activations, language": language,
            "activations, vision": vision,
            "working memory": found.peak(policy) - vision - language,
            "packs and tables": found.inputs + found.tables,
        }
        return memory | {"total": sum(memory.values())}

    def fits(self, config: Config, card: Card) -> bool:
        free = self.free(config, card)
        if free is not None and free < 0:
            return False  # nothing has to be counted for that
        return self.on(config, card).fits

    def speed(self, config: Config, card: Card, outlook: Outlook) -> Speed:
        """Of this rank."""
        shape, samples = largest_pack(config, self.model_config), None
        found = self.costs(config)
        per_step = config.optim.samples_per_step(1)
        tokens, per_pack = typical_pack(
            per_step, shape.tokens, shape.image_tokens, modality=self.model_config.has_modality_token
        )
        if tokens < SAME_SPEED * shape.tokens:
            pairs = shape.pairs * tokens // shape.tokens
            shape, samples = replace(shape, tokens=tokens, supervised=tokens, pairs=pairs), per_pack
            found = costs(self.model_config, bits_of(config), shape, self.dtype, COUNTED_ON)
        graphs = self.on_cuda and config.runtime.cuda_graphs and self.num_ranks == 1
        return predicted(
            found, shape, outlook.policy, self._as_computed(card), copied_layers=outlook.copied_layers,
            graphs=graphs and not config.runtime.deterministic, samples=samples,
        )  # fmt: skip

    def verdict(self, config: Config, card: Card, samples: int | None, remedies: Remedies) -> Verdict:
        """`samples`: of the whole run, over all epochs."""
        found = self.on(config, card)
        speed = self.speed(config, card, found)
        helps = "" if found.fits else " ".join(next(iter(remedies(self, config, card)), ()))
        rate = speed.samples_per_second * self.num_ranks
        return Verdict(
            card=card.name, fits=found.fits, policy=found.policy.describe(), copied_layers=found.copied_layers,
            peak_bytes=found.memory["total"], limit_bytes=limit_of(config, card),
            within_budget=limit_of(config, card) < card.memory, memory_bytes=found.memory,
            samples_per_second=rate, tokens_per_second=speed.tokens_per_second * self.num_ranks,
            hours=None if samples is None else samples / rate / 3600, remedy=helps,
        )  # fmt: skip

    def _as_computed(self, card: Card) -> Card:
        return card.in_fp32() if self.dtype == torch.float32 else card

    def _share(self, config: Config, choice: MemoryChoice) -> Share | None:
        """What becomes of the memory that activations leave."""
        self.model.use_activation_policy(choice.policy)
        return share_of(
            config, self.model.language, self.dtype.itemsize, on_cuda=self.on_cuda, spare=choice.spare
        )  # fmt: skip

    def _buffer(self, config: Config, found: Costs, share: Share | None) -> int:
        """Bytes of the buffer for unpacked weights. Where no layer of the language model needs it, a quantised head
        or tower may."""
        counted_ring = found.buffers - found.tables  # takes the largest group of all
        if share is None:
            return counted_ring
        if share.num_copied < len(self.model.language.layers):
            return max(share.scratch, counted_ring)
        return max(share.scratch, largest_tower_group(self.model, self.dtype) if bits_of(config).vision < 16 else 0)


def limit_of(config: Config, card: Card) -> int:
    """Bytes that the run may take on a card."""
    return min(card.memory, parse_size(config.memory_budget)) if config.memory_budget else card.memory
