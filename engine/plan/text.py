"""The plan as the lines that stand before a run, and that --plan prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.memory_size import gib

if TYPE_CHECKING:
    from engine.plan.make import Plan
    from engine.plan.verdict import Verdict

SMALL = 0.01  # of the total; parts below are summed up


def plan_text(plan: Plan) -> str:
    """A paragraph on the run, its memory by part, and a table of cards."""
    total = plan.memory_bytes["total"]
    lines = [
        f"model      {plan.model}, {plan.bits}",
        f"trains     {plan.trainable_parameters:,} of {sum(plan.parameters.values()):,} parameters",
        f"step       {plan.samples_per_step} samples in packs of {plan.tokens_per_pack:,} tokens, "
        f"peak learning rate {plan.peak_lr:.4g}",
        f"disk       {', '.join(f'{name} {_size(size)}' for name, size in plan.disk_bytes.items())}",
        f"memory     {gib(total)} predicted, {plan.policy}",
        *_memory(plan),
    ]
    if plan.cards:
        lines += ["", *_table(plan)]
    return "\n".join(lines)


def _memory(plan: Plan) -> Iterator[str]:
    parts = {name: size for name, size in plan.memory_bytes.items() if name != "total"}
    small = SMALL * plan.memory_bytes["total"]
    large = sorted(((size, name) for name, size in parts.items() if size >= small), reverse=True)
    rest = sum(size for size in parts.values() if size < small)
    rows = [*large, (rest, "the rest")] if rest else large
    width = max(len(name) for _, name in rows)
    for size, name in rows:
        yield f"           {name:<{width}}  {gib(size):>10}"


def _table(plan: Plan) -> Iterator[str]:
    """One line a card."""
    yield "predicted, for samples of 287 tokens, half of them with an image"
    yield _row("card", "memory", "tokens/s", "samples/s", "hours", "verdict")
    for card in plan.cards:
        hours = "" if card.hours is None else f"{card.hours:,.1f}"
        speed = (f"{card.tokens_per_second:,.0f}", f"{card.samples_per_second:.1f}", hours) if card.fits else ("",) * 3
        yield _row(card.card, gib(card.peak_bytes), *speed, _verdict(card, plan.policy))


def _row(card: str, memory: str, tokens: str, samples: str, hours: str, verdict: str) -> str:
    return f"{card:<10} {memory:>11} {tokens:>9} {samples:>9} {hours:>7}  {verdict}".rstrip()


def _verdict(card: Verdict, usual: str) -> str:
    if not card.fits:
        return f"does not fit; with {card.remedy} it does" if card.remedy else "does not fit, and no flag helps"
    less = "" if card.policy == usual else f"; {card.policy}"
    copies = f"; {card.copied_layers} layers unpacked for good" if card.copied_layers else ""
    return f"fits{less}{copies}"


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
