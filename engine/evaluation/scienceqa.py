"""`eval.py --task scienceqa`: the score table of a run, or of an adapter file on its base weights."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.build import open_scienceqa
from engine.config import Config, EvalConfig
from engine.data.scienceqa import ScienceQA
from engine.errors import UsageError
from engine.evaluation.letters import predict
from engine.evaluation.score import LAVIN_NAMES, format_table, parse_answer, parse_answer_legacy, score_table
from engine.files import write_atomic
from engine.generation import Sampling, generate
from engine.trained import Trained, open_trained, run_config
from models.weights.lavin import read_lavin_args


def evaluate(config: EvalConfig, notes: Sequence[str]) -> int:
    """Prints the table, writes scores and predictions. Returns the exit code."""
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if config.legacy.clip_router and not config.generate:
        raise UsageError(
            "--legacy.clip_router without --generate", where="command line",
            why="what a picture is batched with only matters where LaVIN's batches are reproduced",
            do="add --generate, and --max_batch_size as LaVIN's line had it",
        )  # fmt: skip
    trained = _open(config)
    print(f"weights: {trained.weights}", file=sys.stderr)
    dataset = open_scienceqa(trained.config, trained.tokenizer, config.split)
    count = min(config.num or len(dataset), len(dataset))
    print(f"evaluating {count:,} problems of {config.split}", file=sys.stderr)
    ask = _generate if config.generate else _compare
    answers = ask(trained, dataset, config, count)
    problems = dataset.problems[:count]
    table = score_table(problems, [answer.choice for answer in answers])
    print(format_table({config.split: table}))
    failed = sum(answer.failed for answer in answers)
    if failed:
        print(f"{failed} of {count} answers name no choice")
    _write(config, dataset, table, answers)
    return 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One problem's result."""

    choice: int
    failed: bool = False  # the generated text named no choice
    text: str = ""


def _open(config: EvalConfig) -> Trained:
    """The run to evaluate, or the adapter file on the base that this command names."""
    if config.run:
        base = run_config(config.run, config.runtime)
        base.dataset.root = config.dataset.root or base.dataset.root
        weights = Path(config.run)
    else:
        if not config.adapter.init:
            raise UsageError(
                "nothing to evaluate", where="command line", do="give --run RUN, or --adapter.init FILE with its base"
            )
        base = Config(
            bits=config.bits, model=config.model, adapter=config.adapter, dataset=config.dataset,
            runtime=config.runtime, legacy=config.legacy,
        )  # fmt: skip
        weights = Path(config.adapter.init)
        if weights.is_file():
            _warn_about(base, weights)
    if config.legacy.eval_8bit_as_4bit and base.bits == "8bit":
        base.bits = "4bit"
    return open_trained(base, weights)


def _warn_about(config: Config, adapters: Path) -> None:
    """The router's temperature is not in the tensors; a file that says which one it was trained with is believed."""
    temperature = read_lavin_args(adapters).get("temperature")
    if temperature is not None and temperature != config.adapter.temperature:
        print(
            f"warning: {adapters} was trained with router temperature {temperature}, this command says "
            f"{config.adapter.temperature}", file=sys.stderr,
        )  # fmt: skip


def _progress(count: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        if done % 1024 == 0:
            print(f"{done:,} of {count:,}", file=sys.stderr, flush=True)

    return show


def _compare(trained: Trained, dataset: ScienceQA, config: EvalConfig, count: int) -> list[Answer]:
    guesses = predict(
        trained.model, dataset, trained.reader.tile, indices=range(count), on_done=_progress(count),
        tokens_per_batch=trained.config.runtime.tokens_per_batch, device=trained.device,
    )  # fmt: skip
    return [Answer(guess) for guess in guesses]


def _generate(trained: Trained, dataset: ScienceQA, config: EvalConfig, count: int) -> list[Answer]:
    legacy = config.legacy
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.generation_temperature, top_p=config.top_p,
        seed=config.seed, legacy_positions=legacy.decode_positions, legacy_clip_router=legacy.clip_router,
    )  # fmt: skip
    tokenizer = trained.tokenizer
    guesses = random.Random(config.seed)
    answers = []
    show = _progress(count)
    for start in range(0, count, config.max_batch_size):
        indices = range(start, min(start + config.max_batch_size, count))
        prompts = [dataset.prompt_sample(i) for i in indices]
        tiles = [None if p.image is None else trained.reader.tile(p.image) for p in prompts]
        written = generate(
            trained.model, prompts, tiles, sampling=sampling, eos_id=tokenizer.eos_id, device=trained.device
        )
        for i, ids in zip(indices, written, strict=True):
            text, options = tokenizer.decode(ids), dataset.options
            num_choices = len(dataset.problems[i]["choices"])
            found = parse_answer(text, num_choices, options)
            if legacy.score_whole_text:
                whole = dataset.prompt(i) + text
                answers.append(Answer(parse_answer_legacy(whole, num_choices, options, guesses), False, text))
            else:
                answers.append(Answer(-1 if found is None else found, found is None, text))
        show(len(answers))
    return answers


def _write(config: EvalConfig, dataset: ScienceQA, table: dict[str, float], answers: Sequence[Answer]) -> None:
    folder = Path(config.run) if config.run else Path(config.adapter.init).parent
    path = Path(config.output) if config.output else folder / f"eval-scienceqa-{config.split}.json"
    scores = {name: None if math.isnan(value) else round(value, 4) for name, value in table.items()}
    content = {
        "task": "scienceqa", "split": config.split, "problems": len(answers), "generated": config.generate,
        "accuracy": scores, **{LAVIN_NAMES[name]: value for name, value in scores.items()},
        "failed": sum(answer.failed for answer in answers),
        "predictions": {q: a.choice for q, a in zip(dataset.qids, answers, strict=False)},
        "texts": {q: a.text for q, a in zip(dataset.qids, answers, strict=False) if a.text},
    }  # fmt: skip
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    print(f"scores: {path}")
