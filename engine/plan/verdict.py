"""Card by card: does a run fit, with which activation policy, how fast, and what helps where it does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from engine.build import BITS
from engine.config import Config
from engine.memory_size import parse_size
from engine.plan.accounting import Costs, costs
from engine.plan.activation_policy import Choice, Layers, solve
from engine.plan.cards import CARDS, Card
from engine.plan.fixed_memory import bits_of, frozen_bytes, parameters_by_part, trained_bytes
from engine.plan.memory_budget import CONTEXT_BYTES, RESERVE, largest_pack
from engine.plan.meta_model import META, Bits, PackShape
from engine.plan.roofline import seconds
from engine.plan.speed import Speed, predicted
from engine.plan.unpacked_memory import Share, share_of
from engine.plan.workload import PAIRS_PER_TOKEN
from kernels.counting import Op
from models.recompute import POLICIES, ActivationPolicy, Policy
from models.vlm import VisionLanguageModel, VLMConfig

FEWEST_TOKENS = 256  # of a pack that a remedy asks for
CLEARLY = 0.03  # of the memory
Memory = dict[str, int]  # bytes by part


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a card does with a run. All predicted."""

    card: str
    fits: bool
    policy: str  # which layers keep what
    copied_layers: int  # of the language model, that are kept unpacked too
    peak_bytes: int
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
    speed: Speed
    fits: bool


class Planner:
    """Plans one model under changing configurations; what was counted once is kept."""

    def __init__(self, model_config: VLMConfig, *, num_ranks: int, dtype: torch.dtype, on_cuda: bool) -> None:
        self.model_config, self.num_ranks, self.dtype, self.on_cuda = model_config, num_ranks, dtype, on_cuda
        with META:
            self.model = VisionLanguageModel(model_config)
        self.parameters = parameters_by_part(self.model)
        self.trainable = sum(p.numel() for p in self.model.trainable().values())
        self._costs = cache(self._count)

    def _count(self, bits: Bits, shape: PackShape) -> Costs:
        return costs(self.model_config, bits, shape, self.dtype, CARDS[-1])

    def costs(self, config: Config) -> tuple[Costs, PackShape]:
        """Of the largest pack that the run can meet."""
        pack = largest_pack(config)
        shape = replace(pack, pairs=PAIRS_PER_TOKEN * pack.tokens)
        return self._costs(bits_of(config), shape), shape

    def fixed(self, config: Config) -> Memory:
        """Bytes of all that is there before a pack."""
        memory = frozen_bytes(self.model, bits_of(config), self.dtype.itemsize)
        memory |= trained_bytes(self.trainable, self.num_ranks)
        if self.on_cuda:
            memory["cuda context"] = CONTEXT_BYTES
        return memory

    def spare(self, config: Config, card: Card) -> int:
        """Bytes for activations and copies of weights on this card, as a run finds them (memory_budget.py)."""
        counted, _ = self.costs(config)
        free = limit_of(config, card) - sum(self.fixed(config).values())
        return int(free * (1 - RESERVE)) - counted.inputs - counted.buffers

    def policy(self, config: Config, card: Card) -> ActivationPolicy:
        """Least recomputation that fits this card; the leanest where nothing does."""
        counted, _ = self.costs(config)
        vision, language = counted.vision.count, counted.language.count
        if config.gradient_checkpointing:
            return ActivationPolicy.uniform("keep_input", language, vision)
        if not self.on_cuda:
            return ActivationPolicy.uniform("save_all", language, vision)
        stages = [
            _timed(counted.vision, counted.vision_work.backward, card, narrow=True),
            _timed(counted.language, counted.language_work.backward, card, narrow=False),
        ]
        found = solve(stages, counted.after, self.spare(config, card))
        return ActivationPolicy(language=found.policies[1], vision=found.policies[0])

    def share(self, config: Config, card: Card, policy: ActivationPolicy) -> Share | None:
        """What becomes of the memory that activations leave."""
        self.model.use_activation_policy(policy)
        spare = 0 if config.gradient_checkpointing else self.spare(config, card) - self.costs(config)[0].peak(policy)
        return share_of(
            config, self.model.language, self.dtype.itemsize, on_cuda=self.on_cuda, spare=max(0, spare)
        )  # fmt: skip

    def on(self, config: Config, card: Card) -> Outlook:
        """The best that this configuration can do on a card."""
        counted, shape = self.costs(config)
        policy = self.policy(config, card)
        share = self.share(config, card, policy)
        vision, language = counted.saved(policy)
        memory = self.fixed(config)
        memory |= {} if share is None else {"dequantisation buffer": share.scratch, "unpacked copies": share.copies}
        memory |= {
            "activations, language": language,
            "activations, vision": vision,
            "working memory": counted.peak(policy) - vision - language,
            "packs and tables": counted.inputs + counted.tables,
        }
        memory["total"] = sum(memory.values())
        copied = 0 if share is None else share.num_copied
        graphs = (
            self.on_cuda and config.runtime.cuda_graphs and not config.runtime.deterministic and self.num_ranks == 1
        )
        speed = predicted(counted, shape, policy, card, copied_layers=copied, graphs=graphs)
        return Outlook(policy, copied, memory, speed, memory["total"] <= limit_of(config, card))

    def fits(self, config: Config, card: Card) -> bool:
        if sum(self.fixed(config).values()) > limit_of(config, card):
            return False  # nothing has to be counted for that
        return self.on(config, card).fits

    def verdict(self, config: Config, card: Card, samples: int | None) -> Verdict:
        """`samples`: of the whole run, over all epochs."""
        found = self.on(config, card)
        helps = "" if found.fits else " ".join(next(iter(self.remedies(config, card)), ()))
        rate = found.speed.samples_per_second * self.num_ranks
        return Verdict(
            card=card.name, fits=found.fits, policy=found.policy.describe(), copied_layers=found.copied_layers,
            peak_bytes=found.memory["total"], memory_bytes=found.memory, samples_per_second=rate,
            tokens_per_second=found.speed.tokens_per_second * self.num_ranks,
            hours=None if samples is None else samples / rate / 3600, remedy=helps,
        )  # fmt: skip

    def remedies(self, config: Config, card: Card) -> Iterator[tuple[str, ...]]:
        """Flags with which the run fits a card, planned anew with each; the cheapest first, then combinations."""
        steps = list(_steps(config))
        together: list[tuple[str, ...]] = []
        for flags, apply in steps:
            changed = copy.deepcopy(config)
            apply(changed)
            if self.fits(changed, card):
                yield flags
        for last in range(1, len(steps)):
            changed = copy.deepcopy(config)
            together = []
            for flags, apply in steps[: last + 1]:
                apply(changed)
                together = [*(f for f in together if f[0] != flags[0]), flags]
            if self.fits(changed, card):
                yield tuple(word for flags in together for word in flags)
                return

    def savers(self, config: Config, card: Card) -> Iterator[tuple[str, ...]]:
        """Flags with which a run takes clearly less than now, whether or not it was to fit; the cheapest first."""
        present = self.least(config, card)
        recomputing = (("--gradient_checkpointing",), _setting("", "gradient_checkpointing", True))
        for flags, apply in (recomputing, *_steps(config)):
            changed = copy.deepcopy(config)
            apply(changed)
            if self.least(changed, card) <= (1 - CLEARLY) * present:
                yield flags

    def least(self, config: Config, card: Card) -> int:
        """Bytes that the run takes without the copies that it makes of what is left."""
        memory = self.on(config, card).memory
        return memory["total"] - memory.get("unpacked copies", 0)


def limit_of(config: Config, card: Card) -> int:
    """Bytes that the run may take on a card."""
    return min(card.memory, parse_size(config.memory_budget)) if config.memory_budget else card.memory


def _timed(layers: Layers, backward: Mapping[Policy, Sequence[Op]], card: Card, *, narrow: bool) -> Layers:
    """The layers with the times of another card."""
    times = {policy: seconds(backward[policy], card, narrow=narrow) for policy in POLICIES}
    choices = {
        policy: Choice(choice.saved, choice.peak, max(0.0, times[policy] - times["save_all"]))
        for policy, choice in layers.choices.items()
    }
    return Layers(layers.count, choices)


def _steps(config: Config) -> Iterator[tuple[tuple[str, ...], Callable[[Config], None]]]:
    """What can be given up, the cheapest first: flags, and their effect. Recomputation comes before all of these where
    the run chooses it itself."""
    tokens = config.runtime.tokens_per_batch // 2
    least = max(FEWEST_TOKENS, config.dataset.max_seq_len)
    while tokens >= least:
        yield ("--runtime.tokens_per_batch", str(tokens)), _setting("runtime", "tokens_per_batch", tokens)
        tokens //= 2
    for name, trained in (("bits_vision", config.train.vision), ("bits_head", config.train.language)):
        if BITS[getattr(config, name)] > 4 and trained != "full":
            yield (f"--{name}", "4bit"), _setting("", name, "4bit")
    if config.train.language != "full":
        for bits in ("8bit", "4bit"):
            if BITS[bits] < BITS[config.bits]:
                yield ("--bits", bits), _setting("", "bits", bits)


def _setting(part: str, name: str, value: object) -> Callable[[Config], None]:
    return lambda config: setattr(getattr(config, part) if part else config, name, value)
