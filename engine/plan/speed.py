"""How fast a run trains, predicted from its ops (accounting.py) on a card's roofline (roofline.py).

A tower looks at every image of a pack here: that a frozen one's features are kept (engine/tower_cache.py) is not
counted, so such a run should be faster than this. Ops that are in no layer (embedding, the tower's ends, projector,
head and loss) all go by the supervised rows, as head and loss do, which are most of that work.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.plan.accounting import Costs, Work
from engine.plan.cards import Card
from engine.plan.meta_model import PackShape
from engine.plan.roofline import seconds
from engine.plan.workload import IMAGE_SHARE, SUPERVISED, mean_length, samples_per_pack
from models.recompute import ActivationPolicy, Policy


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted."""

    samples_per_second: float
    tokens_per_second: float  # of samples: what fills packs up does not count


def predicted(
    costs: Costs, shape: PackShape, policy: ActivationPolicy, card: Card, *, copied_layers: int = 0,
    graphs: bool = True, samples: float | None = None,
) -> Speed:  # fmt: skip
    """Of packs of so many tokens, with images and supervised rows as ScienceQA has them, whatever `shape` was counted
    with. `copied_layers`: how many of the language model's last layers are never unpacked. `samples` of a pack; None:
    as many as fill it."""
    samples = samples_per_pack(shape.tokens, shape.image_tokens) if samples is None else samples
    time = pass_seconds(
        costs, policy, card, copied_layers=copied_layers, graphs=graphs,
        supervised=SUPERVISED * samples / shape.supervised,
        images=IMAGE_SHARE * samples * shape.image_tiles / shape.tiles if shape.tiles else 0.0,
    )  # fmt: skip
    return Speed(samples / time, samples * mean_length(shape.image_tokens) / time)


def pass_seconds(
    costs: Costs, policy: ActivationPolicy, card: Card, *, copied_layers: int = 0, graphs: bool = True,
    supervised: float = 1.0, images: float = 1.0,
) -> float:  # fmt: skip
    """Of the pack that was counted, forward and backward, with these shares of its supervised rows and its tiles."""
    time = supervised * seconds(costs.other_work, card, graphs=graphs)
    for chosen in set(policy.vision):
        layer = _layer(costs.vision_work, chosen, card, narrow=True, graphs=graphs)
        time += images * policy.vision.count(chosen) * layer
    first_copied = len(policy.language) - copied_layers
    for index, chosen in enumerate(policy.language):
        time += _layer(costs.language_work, chosen, card, narrow=False, graphs=graphs, copied=index >= first_copied)
    return time


def _layer(work: Work, policy: Policy, card: Card, *, narrow: bool, graphs: bool, copied: bool = False) -> float:
    ops = [*work.forward, *work.backward[policy]]
    if copied:
        ops = [op for op in ops if not op.name.startswith("dequantize")]
    return seconds(ops, card, narrow=narrow, graphs=graphs)
