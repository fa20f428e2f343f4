"""Flags with which a run takes less memory, the cheapest first. Each is planned anew, so that it is known to help."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal

from engine.config import BITS, Config, longest_sample
from engine.memory_size import parse_size
from engine.plan.cards import Card
from engine.plan.memory_budget import MemoryChoice
from engine.plan.verdict import Planner
from models.recompute import ActivationPolicy

FEWEST_TOKENS = 256  # of a pack that a remedy asks for
CLEARLY = 0.03  # of the memory
LESS = 0.9  # of what is taken now: a budget to ask for

Step = tuple[tuple[str, ...], Callable[[Config], None]]  # flags, and their effect
Doing = Literal["loading", "training", "scoring"]  # what a run does when its memory ends


def remedies(planner: Planner, config: Config, card: Card) -> Iterator[tuple[str, ...]]:
    """Flags with which the run fits a card: single ones, then combinations."""
    steps = list(_steps(config))
    for flags, apply in steps:
        changed = _changed(config, apply)
        if flags[0].startswith("--bits") and not _frees_enough(planner, config, changed, card):
            continue  # nothing has to be counted for that
        if planner.fits(changed, card):
            yield flags
    for last in range(1, len(steps)):
        changed = copy.deepcopy(config)
        together: list[tuple[str, ...]] = []
        for flags, apply in steps[: last + 1]:
            apply(changed)
            together = [*(f for f in together if f[0] != flags[0]), flags]
        if planner.fits(changed, card):
            yield tuple(word for flags in together for word in flags)
            return


def _frees_enough(planner: Planner, config: Config, changed: Config, card: Card) -> bool:
    """Whether fewer bits, with which a pack takes no less than before, may be enough."""
    before, after = planner.free(config, card), planner.free(changed, card)
    if before is None or after is None:
        return True
    memory = planner.on(config, card).memory
    copies = memory["unpacked copies"] + memory["dequantisation buffer"]  # these are made anew
    return memory["total"] - sum(planner.fixed(config).values()) - copies <= after


def savers(
    planner: Planner, config: Config, card: Card, choice: MemoryChoice | None, doing: Doing, *, same_bits: bool
) -> Iterator[tuple[str, ...]]:
    """Flags with which a run takes clearly less than now, whether or not it was to fit.

    Args:
        choice: what the run has made of the memory; None: nothing yet.
        same_bits: the run is to go on from a checkpoint, which holds for the bits that it was trained with.
    """
    present = _taken(planner, config, card, choice, doing)
    for flags, apply in _all_steps(planner, config, card, choice, doing):
        if same_bits and flags[0].startswith("--bits"):
            continue
        if _taken(planner, _changed(config, apply), card, None, doing) <= (1 - CLEARLY) * present:
            yield flags


def _all_steps(
    planner: Planner, config: Config, card: Card, choice: MemoryChoice | None, doing: Doing
) -> Iterator[Step]:
    if doing != "loading" and planner.on_cuda and config.bits != "16bit" and _asks_for_copies(config):
        yield ("--runtime.unpacked_memory", "0"), _setting("runtime", "unpacked_memory", "0")
    if doing == "training" and not config.gradient_checkpointing:
        total = planner.on(config, card, choice).memory["total"]
        if planner.on_cuda:
            budget = f"{LESS * total / 1e9:.1f}GB"
            if planner.fits(_changed(config, _setting("", "memory_budget", budget)), card):
                yield ("--memory_budget", budget), _setting("", "memory_budget", budget)
        yield ("--gradient_checkpointing",), _setting("", "gradient_checkpointing", True)
    yield from (step for step in _steps(config) if step[0] != ("--runtime.unpacked_memory", "auto"))


def _taken(planner: Planner, config: Config, card: Card, choice: MemoryChoice | None, doing: Doing) -> int:
    """Bytes that the run takes while it does this. Scoring keeps no more than keep_input does."""
    if doing == "loading":
        return sum(planner.fixed(config).values())
    if doing == "scoring":
        spare = (choice or planner.choice(config, card)).spare
        leanest = ActivationPolicy.uniform(
            "keep_input", len(planner.model.language.layers), len(planner.model.vision.layers)
        )
        choice = MemoryChoice(leanest, spare, "")
        config = copy.deepcopy(config)
        config.optim.accum_iter = config.runtime.tokens_per_batch  # its packs are full, however small a step is
    return planner.on(config, card, choice).memory["total"]


def _asks_for_copies(config: Config) -> bool:
    asked = config.runtime.unpacked_memory
    return asked == "auto" or parse_size(asked) > 0


def _steps(config: Config) -> Iterator[Step]:
    """What can be given up, the cheapest first. Recomputation comes before all of these where the run chooses it
    itself."""
    if config.runtime.unpacked_memory != "auto" and parse_size(config.runtime.unpacked_memory):
        yield ("--runtime.unpacked_memory", "auto"), _setting("runtime", "unpacked_memory", "auto")
    tokens = config.runtime.tokens_per_batch // 2
    least = max(FEWEST_TOKENS, longest_sample(config))
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


def _changed(config: Config, apply: Callable[[Config], None]) -> Config:
    changed = copy.deepcopy(config)
    apply(changed)
    return changed


def _setting(part: str, name: str, value: object) -> Callable[[Config], None]:
    return lambda config: setattr(getattr(config, part) if part else config, name, value)
