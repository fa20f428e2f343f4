"""`chat.py`: questions to a trained run, with or without a picture.

A run that was trained on ScienceQA is asked in ScienceQA's form: what stands from "(A)" on are the options. Any other
run is asked in the form of instructions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from engine.config import ChatConfig, dataset_format
from engine.data.rows import instruction
from engine.generation import Sampling, generate
from engine.trained import Trained, open_trained, run_config


def chat(config: ChatConfig) -> int:
    """Answers --question, or each line that is typed, and prints the answer. Returns the exit code."""
    trained = open_trained(run_config(config.run, config.runtime), Path(config.run))
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p)
    generator = torch.Generator(device=trained.device).manual_seed(config.seed)
    questions: Iterable[str] = [config.question] if config.question else _typed()
    for question in questions:
        print(answer(trained, question, config.image, sampling, generator), flush=True)
    return 0


def answer(trained: Trained, question: str, image: str, sampling: Sampling, generator: torch.Generator) -> str:
    """What the model writes about the picture at `image` ("" for none)."""
    path = str(Path(image).resolve()) if image else None
    tile = None if path is None else trained.reader.tile(path, "--image")
    is_scienceqa = dataset_format(trained.config) == "scienceqa"
    text = scienceqa_prompt(question) if is_scienceqa else instruction(question)
    prompt = trained.layout.prompt_only("the question", text, path)
    tokenizer = trained.tokenizer
    written = generate(
        trained.model, [prompt], [tile],
        sampling=sampling, generator=generator, eos_id=tokenizer.eos_id, stop_ids=tokenizer.stop_ids,
        device=trained.device,
    )  # fmt: skip
    return tokenizer.decode(written[0])


def scienceqa_prompt(question: str) -> str:
    """`How many? (A) one (B) two` -> the QCM prompt of ScienceQA, without context."""
    text, marker, options = question.partition("(A)")
    return f"Question: {text.strip()}\nContext: N/A\nOptions: {(marker + options).strip()}\nResponse:"


def _typed() -> Iterator[str]:
    """Lines from a terminal until an empty one, or from a pipe until its end."""
    if sys.stdin.isatty():
        print("Type a question (an empty line ends).", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.strip()
