"""What a run needs and how long it takes, before it begins: parameters, memory by part, disk, and a verdict for each
card. Without a GPU and without weights, in seconds; everything is predicted, nothing measured.

Memory and speed come from the model's own code, run on tensors without contents (engine/plan/accounting.py).
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass

import torch

from engine.build import bits_of
from engine.config import Config, longest_sample
from engine.data.room import check_room
from engine.pictures import anyres_of
from engine.plan.cards import CARDS, Card
from engine.plan.memory_budget import largest_pack
from engine.plan.remedies import remedies
from engine.plan.shapes import bytes_of as bytes_of
from engine.plan.shapes import shapes
from engine.plan.text import plan_text as plan_text
from engine.plan.verdict import Memory, Planner, Verdict
from engine.plan.workload import mean_length, samples_of
from engine.tensor_file import file_size
from models.placement import specs
from models.vlm import VLMConfig

BYTES_A_TRAINED = 12  # in a checkpoint: the weight and both moments


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's needs. Bytes, speeds and hours are predictions."""

    model: str
    bits: str
    parameters: dict[str, int]  # by part
    trainable_parameters: int
    policy: str  # of `memory_bytes`: which layers keep what, on this GPU or where there is memory for all
    memory_bytes: Memory  # by part, with the sum as "total"
    samples_per_step: int
    tokens_per_pack: int
    tokens_per_sample: int  # on average, as speeds are predicted for
    peak_lr: float
    checkpoint_bytes: int
    disk_bytes: dict[str, int]
    here: Verdict | None  # of the GPU of this run; None where there is none, or where nothing is to be run
    cards: list[Verdict]  # none for a run on the CPU
    fits: dict[str, bool]  # by card

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def make_plan(
    config: Config, model_config: VLMConfig, name: str, *, num_ranks: int, dense_bytes: int = 2, on_cuda: bool = True,
    samples: int | None = None, weight_bytes: int | None = None, card: Card | None = None,
) -> Plan:  # fmt: skip
    """Counts a run.

    Args:
        dense_bytes: the width of activations and 16-bit weights: 2 on a GPU, 4 on a CPU.
        samples: of an epoch, where they are known; weight_bytes: of the weight files, where they are here.
        card: the GPU that will run it.
    """
    dtype = torch.float32 if dense_bytes == 4 else torch.bfloat16
    planner = Planner(model_config, num_ranks=num_ranks, dtype=dtype, on_cuda=on_cuda)
    samples = samples_of(config) if samples is None else samples
    pack = largest_pack(config, model_config)
    whole_run = None if samples is None else samples * config.optim.epochs
    verdicts = [planner.verdict(config, each, whole_run, remedies) for each in CARDS] if on_cuda else []
    here = None if card is None else planner.verdict(config, card, whole_run, remedies)
    policy, memory = (here.policy, here.memory_bytes) if here is not None else _roomy(planner, config)
    return Plan(
        model=name, bits=config.bits, parameters=planner.parameters, trainable_parameters=planner.trainable,
        policy=policy, memory_bytes=memory,
        samples_per_step=config.optim.samples_per_step(num_ranks), tokens_per_pack=pack.tokens,
        tokens_per_sample=mean_length(pack.image_tokens),
        peak_lr=config.optim.peak_lr(num_ranks), checkpoint_bytes=BYTES_A_TRAINED * planner.trainable,
        disk_bytes=_disk(config, planner, weight_bytes), here=here, cards=verdicts,
        fits={verdict.card: verdict.fits for verdict in verdicts},
    )  # fmt: skip


def _roomy(planner: Planner, config: Config) -> tuple[str, Memory]:
    """Policy and memory of a run on the largest card."""
    plain = copy.deepcopy(config)
    if config.runtime.unpacked_memory == "auto":  # copies take what a card has left, and are no need of the run
        plain.runtime.unpacked_memory = "0"
    found = planner.on(plain, CARDS[-1])
    return found.policy.describe(), found.memory


def _disk(config: Config, planner: Planner, weight_bytes: int | None) -> dict[str, int]:
    """Bytes that a run finds or writes."""
    disk = {} if weight_bytes is None else {"weights": weight_bytes}
    if config.bits != "16bit" and config.model.cache_weights and config.model.language:  # as engine/loading/cache.py
        disk["cache of quantised weights"] = _cache_bytes(config, planner)
    disk["checkpoints"] = (config.log.keep + 1) * BYTES_A_TRAINED * planner.trainable  # one more while it is written
    return disk


def _cache_bytes(config: Config, planner: Planner) -> int:
    """Of the file that engine/loading/cache_writer.py writes."""
    parts = {"language": planner.model.language, "vision": planner.model.vision}
    return file_size(
        {
            f"{part}.{name}": spec
            for part, module in parts.items()
            for name, spec in specs(module, bits=bits_of(config)[part], dtype=planner.dtype).items()
        }
    )


def plan_without_weights(config: Config, num_ranks: int) -> Plan:
    """The plan of a command whose weight folders may not be here (shapes.py, with its errors).

    Raises:
        UsageError: an image's tokens alone fill a sample: the run would not begin.
    """
    found = shapes(config)
    config = found.config
    anyres = anyres_of(config, found.model)
    image_tokens = found.model.tokens_per_tile if anyres is None else anyres.most_tokens()
    check_room(
        longest_sample(config), image_tokens, image_tokens=image_tokens, modality=found.model.has_modality_token
    )  # fmt: skip
    full = "full" in (config.train.language, config.train.vision)
    on_cuda = config.runtime.device != "cpu"
    in_32_bits = config.runtime.precision == "fp32" or (config.runtime.precision == "auto" and (full or not on_cuda))
    return make_plan(
        config, found.model, found.name, num_ranks=num_ranks, dense_bytes=4 if in_32_bits else 2, on_cuda=on_cuda,
        weight_bytes=found.weight_bytes,
    )  # fmt: skip
