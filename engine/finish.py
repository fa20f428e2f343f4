"""The end of a run: its final numbers, the loss plot, the report, and what to type next."""

from __future__ import annotations

import resource
import shlex
from collections.abc import Mapping

import torch

from engine.build import open_scienceqa
from engine.config import dataset_format
from engine.data.prompts import question_with_options
from engine.data.scienceqa import ScienceQA
from engine.environment import device_name
from engine.errors import DataError
from engine.metrics import read_metrics, series
from engine.plot import loss_svg
from engine.report import FinalMetrics, terminal_report, write_final_metrics, write_report
from engine.setup import Setup
from engine.trainer import Trainer


def finish(
    setup: Setup, trainer: Trainer, before: Mapping[str, float], after: Mapping[str, float], seconds: float
) -> None:
    """Writes loss.svg, metrics_final.json and REPORT.md, and prints the report. `before` and `after` are score tables,
    `seconds` the wall time of the whole command."""
    rundir, c = setup.rundir, trainer.counters
    rows = read_metrics(rundir.metrics_jsonl)
    rundir.loss_svg.write_text(loss_svg(series(rows, "loss"), series(rows, "eval_loss")), encoding="utf-8")
    final = FinalMetrics(
        accuracy=after, accuracy_before=before, loss=trainer.loss_ema.value,
        steps=c.step, samples_per_second=c.samples / c.seconds, tokens_per_second=c.tokens / c.seconds,
        peak_memory_bytes=_peak_memory(setup.device), packing_efficiency=c.tokens / c.packed_tokens,
        trainable_parameters=sum(p.numel() for p in setup.model.trainable().values()),
        wall_seconds=seconds, device=device_name(setup.device),
    )  # fmt: skip
    write_final_metrics(rundir.metrics_final, final)
    next_commands = _next_commands(setup)
    title = f"nibble: {rundir.path}"
    write_report(rundir.report, title, final, next_commands, trainer.loader.remarks)
    print(terminal_report(title, final, rundir.report, next_commands), flush=True)
    print(f"loss plot: {rundir.loss_svg}")


def _next_commands(setup: Setup) -> list[str]:
    """What works on this run: evaluation where there is a benchmark, and a question about a picture that it knows."""
    run, config = setup.rundir.path, setup.config
    ask = f"python chat.py --run {run} --image PICTURE --question 'What is shown?'"
    if dataset_format(config) != "scienceqa":
        return [ask]
    try:
        benchmark = setup.benchmark or _benchmark(setup)
    except DataError:  # nobody asked for it, and the run is through
        return [ask]
    asked = f"python chat.py --run {run}"
    for index, problem in enumerate(benchmark.problems):
        image = benchmark.prompt_sample(index).image
        if image is not None and not problem["hint"]:
            asked += f" --image {shlex.quote(image)} --question {shlex.quote(question_with_options(problem))}"
            break
    return [f"python eval.py --run {run} --task scienceqa --split {config.dataset.eval_split}", asked]


def _benchmark(setup: Setup) -> ScienceQA:
    config = setup.config
    return open_scienceqa(config, setup.sources.tokenizer, config.dataset.eval_split, setup.model.config)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
