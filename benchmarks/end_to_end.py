"""The whole model's optimiser step on ScienceQA-shaped samples, beside those who train such models (G15 to G18).

    nibble          the engine: planner, packs of at most T tokens, one step; NF4 layers, 16-bit rest
    lavin_lite      LaVIN-lite's loop in plain PyTorch and bitsandbytes (lavin_lite.py)
    hf_peft         transformers, PEFT's LoRA and bitsandbytes, micro-batches of four (hugging_face.py)
    hf_liger        the same with Liger's kernels
    bf16_adapters   the engine without quantisation: the ceiling

All get the same samples (workload.py) on random weights. Operations are 4 for each weight of a product and real token
that needs it (forward and dX; the head's on supervised rows only): attention, the tower, padding, recomputation and
dequantisation earn nothing, so `fraction`, of the measured matrix rate, is MFU4 and a lower bound. `policy` is what
layers keep ("auto": as the engine chooses), `cap` a limit in GB (10^9) on what torch may take of the card.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import command, lengths
from benchmarks.engine_setting import Setting, configuration, settle
from benchmarks.hugging_face import HuggingFaceTrainer
from benchmarks.lavin_lite import LavinTrainer
from benchmarks.peers import require_csrc
from benchmarks.problem import Case, Yardstick
from benchmarks.rows import Origin, Row
from benchmarks.session import new_row
from benchmarks.step import DTYPE, MODELS, TOWER, block_weights, build
from benchmarks.trainers import NibbleTrainer, Trainer, packs_of
from benchmarks.whole_steps import Entrant, Steps, measure_steps, release, told
from benchmarks.workload import Workload, of_lengths, workload
from engine.data.padding import pad
from engine.data.planning import MODALITY_ROWS
from engine.plan.memory_budget import resident_bytes
from kernels import unpacked
from models.language.llama import LlamaConfig
from models.pack import Pack
from models.vision.clip import ClipConfig
from models.vlm import VisionLanguageModel

STEP = 32  # samples, LaVIN's effective batch
FULL = 28  # samples that fill one pack of 8,192 tokens; 32 would be two of 4,700
CAP = 24
GB = 10**9
ROUNDS, QUICK_ROUNDS = 5, 2
PROFILED = (("7B", 512), ("7B", 2048))  # models and packs whose idle share a goal asks for
PEERS = ("lavin_lite", "hf_peft", "hf_liger", "bf16_adapters")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and the longest sample that it is given."""

    language: LlamaConfig
    tower: ClipConfig
    longest: int = lengths.LONGEST


SHAPES = {name: Shape(MODELS[name], ClipConfig()) for name in ("7B", "13B")}
SHAPES["toy"] = Shape(MODELS["toy"], TOWER, longest=64)
PACKAGES = {"lavin_lite": "bitsandbytes", "hf_peft": "peft", "hf_liger": "liger-kernel"}


def cases() -> list[Case]:
    """Those with peers come first of their model, whose weights stay as long as it is asked for. Those that are
    profiled come last: when the profiler is done it goes on slowing launches down, the peers' more than ours.
    """

    def case(model: str, tokens: int, samples: int, policy: str = "auto", cap: int = 0, quick: bool = True) -> Case:
        shape = {"model": model, "T": tokens, "samples": samples, "policy": policy, "cap": cap}
        return Case("end_to_end", shape, modes=("step",), quick=quick)

    return [
        case("7B", 8192, FULL),
        case("7B", 512, 1, "keep_input"),
        case("7B", 4096, STEP, quick=False),
        case("13B", 8192, FULL),
        case("13B", 512, 1, "keep_input"),
        case("13B", 2048, STEP, "save_all", CAP),
        case("13B", 2048, STEP, quick=False),
        case("13B", 4096, STEP, quick=False),
        case("7B", 2048, STEP),
        case("7B", 512, STEP),
    ]


def trainers(case: Case, *, quick: bool) -> tuple[str, ...]:
    """Peers know no packs: once for each model, where packs are largest. --quick leaves out those that no goal asks
    for."""
    model, tokens = case.shape["model"], case.shape["T"]
    if case.shape["samples"] != FULL:  # 13B in 16 bits is beside the rest where packs are smaller
        return ("nibble", "bf16_adapters") if (model, tokens) == ("13B", 4096) else ("nibble",)
    if model == "13B":
        return ("nibble", "lavin_lite") if quick else ("nibble", "lavin_lite", "hf_peft", "hf_liger")
    return ("nibble", *PEERS[:3]) if quick else ("nibble", *PEERS)


def is_profiled(case: Case) -> bool:
    """Whether the engine's idle share and waits are measured."""
    return case.shape["samples"] == STEP and (case.shape["model"], case.shape["T"]) in PROFILED


def rows(case: Case, device: torch.device, origin: Origin, quick: bool) -> Iterator[Row]:
    """One row a trainer, as soon as it is known."""
    shape, dtype = SHAPES[case.shape["model"]], DTYPE if device.type == "cuda" else torch.float32
    unpacked.release()  # copies of the case before this one
    release(device)
    works = step_samples(case, shape)[: 1 if quick else None]
    tokens, cap = case.shape["T"], case.shape["cap"] * GB
    vlm = model(case.shape["model"], device, dtype)
    packs = [pad(pack) for work in works for pack in packs_of(work, tokens, "sample")]
    longest = max(len(sample.input_ids) for work in works for sample in work.samples)
    config = configuration(case.shape["policy"], tokens, case.shape["samples"], longest, case.shape["cap"])
    settings: list[Setting] = []

    def nibble() -> Trainer:
        require_csrc(vlm)
        there = resident_bytes(vlm, {})  # before the trainer, whose own memory is measured
        trainer = NibbleTrainer(vlm, tokens, device)
        settings.append(settle(config, vlm, case.shape["policy"], device))
        trainer.borrowed_bytes = there
        return trainer

    def bf16_adapters() -> Trainer:
        return NibbleTrainer(weights(shape, device, dtype, bits=16), tokens, device)

    half = torch.float16 if device.type == "cuda" else dtype
    builders: dict[str, Callable[[], Trainer]] = {
        "nibble": nibble,
        "lavin_lite": lambda: LavinTrainer(vlm, device, padded=shape.longest, dtype=half),
        "hf_peft": lambda: HuggingFaceTrainer(shape.language, device, dtype=dtype),
        "hf_liger": lambda: HuggingFaceTrainer(shape.language, device, dtype=dtype, liger=True),
        "bf16_adapters": bf16_adapters,
    }
    entrants = [
        Entrant(name, builders[name], PACKAGES.get(name), profiled=is_profiled(case) and name == "nibble")
        for name in trainers(case, quick=quick)
    ]
    with capped(cap, device):
        for entrant, steps in measure_steps(entrants, works, device, QUICK_ROUNDS if quick else ROUNDS):
            used = half if entrant.name == "lavin_lite" else dtype
            row = new_row(case, entrant.name, str(used).removeprefix("torch."), origin, entrant.package)
            if isinstance(steps, str):
                yield row(failure=steps)
                continue
            done = sum(work.tokens for work in works)
            own = planned(settings[0], vlm, packs, done, device) if entrant.name == "nibble" else {}
            own["setting"] = "; ".join(filter(None, (own.get("setting"), steps.launched))) or None
            yield row("step", **steps.fields(), **figures(steps, works, shape.language, origin), **own)
    release(device)


def planned(
    setting: Setting, vlm: VisionLanguageModel, packs: Sequence[Pack], tokens: int, device: torch.device
) -> dict[str, Any]:
    """The setting and what is predicted of it, as fields of a row. A plan that fails costs no measured row: its fields
    stay empty, which plan_check tells."""
    try:
        return setting.fields(vlm.config, packs, tokens, device)
    except Exception as error:
        print(f"nibble: no plan: {told(error)}", file=sys.stderr, flush=True)
        return {}


def step_samples(case: Case, shape: Shape) -> list[Workload]:
    """Two steps' samples, other ones of the same lengths, so that packs differ; or a single sample, which fills T."""
    vocabulary, size, samples = shape.language.vocab_size, shape.tower.image_size, case.shape["samples"]
    if samples == 1:
        return [of_lengths([case.shape["T"] - MODALITY_ROWS], vocabulary, size)]
    return [workload(samples, vocabulary, size, seed=seed, longest=shape.longest) for seed in range(2)]


_made: dict[str, VisionLanguageModel] = {}  # of the model that was asked for last


def model(name: str, device: torch.device, dtype: torch.dtype) -> VisionLanguageModel:
    """The 4-bit model of this name."""
    return held(name, lambda: weights(SHAPES[name], device, dtype, bits=4), device)


def held(name: str, make: Callable[[], VisionLanguageModel], device: torch.device) -> VisionLanguageModel:
    """The model of this name, made where it is not the one that was asked for last, which then is given back."""
    if name not in _made:
        _made.clear()
        unpacked.release()
        release(device)
        _made[name] = make()
    return _made[name]


def weights(shape: Shape, device: torch.device, dtype: torch.dtype, *, bits: int) -> VisionLanguageModel:
    return build(shape.language, shape.language.num_layers, device, tower=shape.tower, bits=bits, dtype=dtype)


@contextmanager
def capped(limit: int, device: torch.device) -> Iterator[None]:
    """torch takes at most `limit` bytes of the card inside; 0: what there is."""
    if not limit or device.type != "cuda":
        yield
        return
    release(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(device).total_memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def useful_flops(work: Workload, config: LlamaConfig) -> int:
    """4N: forward and dX of each weight, for each real token that needs it."""
    layers = config.num_layers * block_weights(config) * work.tokens
    return round(4 * (layers + config.vocab_size * config.dim * work.supervised))


def figures(steps: Steps, works: Sequence[Workload], config: LlamaConfig, origin: Origin) -> dict[str, Any]:
    """Speed as fields of a row; steps took the workloads in turns."""
    seconds = sum(steps.seconds)
    done = [works[i % len(works)] for i in range(len(steps.seconds))]
    flops = statistics.mean(useful_flops(work, config) for work in done)
    tflops = flops * len(done) / seconds / 1e12
    return {
        "flops": round(flops), "tflops": tflops, "fraction": tflops / origin.matrix_tflops,
        "samples_per_s": sum(len(work.samples) for work in done) / seconds,
        "tokens_per_s": sum(work.tokens for work in done) / seconds,
    }  # fmt: skip


YARDSTICK = Yardstick(
    "end_to_end", __doc__ or "", cases, lambda case: trainers(case, quick=True), rows, tiny={"model": "toy", "T": 128}
)

if __name__ == "__main__":
    sys.exit(command.main(YARDSTICK, sys.argv[1:]))
