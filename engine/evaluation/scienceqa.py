"""`eval.py --task scienceqa`: the score table of a run, or of an adapter file on its base weights."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.build import open_scienceqa
from engine.config import Config, EvalConfig
from engine.data.scienceqa import ScienceQA
from engine.errors import UsageError
from engine.evaluation.letters import predict
from engine.evaluation.score import LAVIN_NAMES, format_table, parse_answer, parse_answer_legacy, score_table
from engine.files import write_atomic
from engine.generation import Sampling, generate, plan_batches
from engine.sources import is_lora_folder
from engine.ticker import Ticker
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
    dataset = open_scienceqa(trained.config, trained.tokenizer, config.split, trained.model.config)
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
    failed: bool = False  # the generated text named no choice; LaVIN guesses one then
    text: str = ""


def _open(config: EvalConfig) -> Trained:
    """The run to evaluate, or the adapter file on the base that this command names."""
    if config.run:
        base = run_config(config.run, config.runtime)
        base.dataset.root = config.dataset.root or base.dataset.root
        weights = Path(config.run)
    else:
        base = Config(
            bits=config.bits, model=config.model, adapter=config.adapter, dataset=config.dataset,
            runtime=config.runtime, legacy=config.legacy,
        )  # fmt: skip
        weights = Path(config.adapter.init)
        if is_lora_folder(weights):
            base.train.language, base.train.vision = "lora", "frozen"
        if weights.is_file():
            _warn_about(base, weights)
    if config.legacy.eval_8bit_as_4bit and base.bits == "8bit":
        base.bits = "4bit"
    return open_trained(base, weights)


def _warn_about(config: Config, adapters: Path) -> None:
    """A temperature that was given wins over the one that the file says it was trained with, but not silently."""
    temperature, given = read_lavin_args(adapters).get("temperature"), config.adapter.temperature
    if None not in (temperature, given) and temperature != given:
        print(
            f"warning: {adapters} was trained with router temperature {temperature}, this command says "
            f"{given}", file=sys.stderr,
        )  # fmt: skip


def _compare(trained: Trained, dataset: ScienceQA, config: EvalConfig, count: int) -> list[Answer]:
    guesses = predict(
        trained.model, dataset, trained.reader.tile, indices=range(count), on_done=Ticker(count, "problems scored"),
        tokens_per_batch=trained.config.runtime.tokens_per_batch, device=trained.device,
    )  # fmt: skip
    return [Answer(guess) for guess in guesses]


def _generate(trained: Trained, dataset: ScienceQA, config: EvalConfig, count: int) -> list[Answer]:
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.generation_temperature, top_p=config.top_p,
        legacy_positions=config.legacy.decode_positions, legacy_clip_router=config.legacy.clip_router,
    )  # fmt: skip
    generator = torch.Generator(device=trained.device).manual_seed(config.seed)
    prompts = [dataset.prompt_sample(i) for i in range(count)]
    batches = plan_batches(
        [len(p.input_ids) for p in prompts], sampling,
        max_batch_size=config.max_batch_size, tokens_per_batch=trained.config.runtime.tokens_per_batch,
    )  # fmt: skip
    texts = [""] * count
    show, done = Ticker(count, "problems answered"), 0
    for members in batches:
        batch = [prompts[i] for i in members]
        tiles = [None if p.image is None else trained.reader.tile(p.image) for p in batch]
        written = generate(
            trained.model, batch, tiles,
            sampling=sampling, generator=generator, eos_id=trained.tokenizer.eos_id,
            stop_ids=trained.tokenizer.stop_ids, device=trained.device,
        )  # fmt: skip
        for i, ids in zip(members, written, strict=True):
            texts[i] = trained.tokenizer.decode(ids)
        done += len(members)
        show(done)
    return _parsed(dataset, texts, config)


def _parsed(dataset: ScienceQA, texts: Sequence[str], config: EvalConfig) -> list[Answer]:
    """What each problem's generated text says."""
    guesses = random.Random(config.seed)
    whole = config.legacy.score_whole_text
    answers = []
    for i, text in enumerate(texts):
        num_choices = len(dataset.problems[i]["choices"])
        if whole:
            found = parse_answer_legacy(dataset.prompt(i) + text, num_choices, dataset.options)
        else:
            found = parse_answer(text, num_choices, dataset.options)
        missed = guesses.randrange(num_choices) if whole and found is None else -1
        answers.append(Answer(missed if found is None else found, found is None, text))
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
