"""The plan as the lines that stand before a run, and that --plan prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.memory_size import gib

if TYPE_CHECKING:
    from engine.plan.make import Plan
    from engine.plan.verdict import Verdict

SMALL = 0.01  # of the total; parts below are summed up
LITTLE = 100 * 2**20  # bytes beside the CUDA context: nothing to look at part by part, or card by card


def plan_text(plan: Plan) -> str:
    """A paragraph on the run and its memory by part, the GPU that will run it, and a table of cards."""
    lines = [
        f"model      {plan.model}, {plan.bits}",
        f"trains     {plan.trainable_parameters:,} of {sum(plan.parameters.values()):,} parameters",
        f"step       {plan.samples_per_step} samples in packs of {plan.tokens_per_pack:,} tokens, "
        f"peak learning rate {plan.peak_lr:.4g}",
        f"disk       {', '.join(f'{name} {_size(size)}' for name, size in plan.disk_bytes.items())}",
        *_memory(plan),
    ]
    if plan.here is not None:
        lines.append(f"this GPU   {_here(plan.here)}")
    if plan.cards:
        lines += _cards(plan)
    return "\n".join(lines)


def _memory(plan: Plan) -> Iterator[str]:
    parts = {name: size for name, size in plan.memory_bytes.items() if name != "total"}
    total, context = sum(parts.values()), parts.get("cuda context", 0)
    of_cuda = f", {gib(context)} of it CUDA's context" if _is_little(plan.memory_bytes) and context else ""
    yield f"memory     {gib(total)} predicted{of_cuda}; {plan.policy}"
    if _is_little(plan.memory_bytes):
        return
    small = SMALL * total
    large = sorted(((size, name) for name, size in parts.items() if size >= small), reverse=True)
    rest = sum(size for size in parts.values() if size < small)
    rows = [*large, (rest, "the rest")] if rest else large
    width = max(len(name) for _, name in rows)
    for size, name in rows:
        yield f"           {name:<{width}}  {gib(size):>10}"


def _is_little(memory: dict[str, int]) -> bool:
    return memory["total"] - memory.get("cuda context", 0) < LITTLE


def _here(card: Verdict) -> str:
    """The card of this run: speed before verdict."""
    name = f"{card.card}, {gib(card.limit_bytes)} for this run: "
    if not card.fits:
        return name + _verdict(card, card.policy)
    hours = "" if card.hours is None else f", {card.hours:,.1f} hours"
    speed = f"{card.tokens_per_second:,.0f} tokens/s, {card.samples_per_second:,.1f} samples/s{hours} predicted"
    return f"{name}{_verdict(card, card.policy)}; {speed}"


def _cards(plan: Plan) -> Iterator[str]:
    """One line a card; one for all where they are all the same."""
    if all(card.fits and _is_little(card.memory_bytes) for card in plan.cards):
        yield f"cards      fits all of {', '.join(card.card for card in plan.cards)}"
        return
    unknown = "; hours: once the data are read" if all(card.hours is None for card in plan.cards) else ""
    yield ""
    yield f"predicted, for samples of {plan.tokens_per_sample:,} tokens, half of them with an image{unknown}"
    yield _row("card", "memory", "tokens/s", "samples/s", "hours", "verdict")
    for card in plan.cards:
        hours = "" if card.hours is None else f"{card.hours:,.1f}"
        speed = (f"{card.tokens_per_second:,.0f}", f"{card.samples_per_second:.1f}", hours) if card.fits else ("",) * 3
        yield _row(card.card, gib(card.peak_bytes), *speed, _verdict(card, plan.policy))


def _row(card: str, memory: str, tokens: str, samples: str, hours: str, verdict: str) -> str:
    return f"{card:<10} {memory:>11} {tokens:>9} {samples:>9} {hours:>7}  {verdict}".rstrip()


def _verdict(card: Verdict, usual: str) -> str:
    if not card.fits:
        reserve = " with the reserve of a run" if card.peak_bytes <= card.limit_bytes else ""
        helps = f"with {card.remedy} it does" if card.remedy else "nothing smaller that was tried does"
        within = f"into --memory_budget's {gib(card.limit_bytes)}" if card.within_budget else ""
        return f"{' '.join(filter(None, ('does not fit', within)))}{reserve}; {helps}"
    less = "" if card.policy == usual else f"; {card.policy}"
    copies = f"; {card.copied_layers} layers unpacked for good" if card.copied_layers else ""
    return f"fits{less}{copies}"


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
