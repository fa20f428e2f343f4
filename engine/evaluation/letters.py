"""ScienceQA in one forward pass a problem: which of its letters is likeliest after "The answer is"?

The model is given the prompt and the beginning of the answer, and the logits of the letters of the choices that exist
are compared. Nothing is sampled, and a problem's result does not depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.data.packing import collate, form_of, plan_packs
from engine.data.sample import IGNORE, Sample
from engine.data.scienceqa import ScienceQA
from engine.data.tokenizer import Tokenizer
from models.vlm import VisionLanguageModel

ANSWER = "The answer is {}."


@dataclass(frozen=True, slots=True)
class Letters:
    """The token that each letter is where it follows "The answer is", and how many tokens stand behind it."""

    ids: list[int]
    tail: int


def find_letters(tokenizer: Tokenizer, options: str) -> Letters:
    """Where the answers of all letters differ first, after a prompt's "Response:".

    Raises:
        ValueError: the tokenizer does not give each letter a token of its own there.
    """
    answers = [tokenizer.encode(f"Response:{ANSWER.format(letter)}") for letter in options]
    for place, ids in enumerate(zip(*answers, strict=False)):
        if len(set(ids)) == len(options):
            return Letters(list(ids), len(answers[0]) - place - 1)
    raise ValueError(f"the tokenizer gives the letters {options!r} no tokens of their own: {answers}")


@torch.no_grad()
def predict(
    model: VisionLanguageModel, dataset: ScienceQA, load: Callable[[str], Tensor], *,
    tokens_per_batch: int, device: torch.device, indices: Sequence[int] | None = None,
    replace_image: Callable[[int, str], str] | None = None, on_done: Callable[[int], None] = lambda count: None,
) -> list[int]:  # fmt: skip
    """The predicted choice of each problem. Leaves the model in evaluation mode.

    `load` decodes an image file to fp32 [3, H, W]; `replace_image` gives problem i another picture than its own, to
    see how much the pictures matter; `on_done` is told how many problems are finished.
    """
    model.eval()
    wanted = list(range(len(dataset))) if indices is None else list(indices)
    letters = find_letters(dataset.layout.tokenizer, dataset.options)
    answer = ANSWER.format(dataset.options[0])
    letter_ids = torch.tensor(letters.ids, device=device)
    form = form_of(model.config)
    guesses: list[int] = []
    window = max(1, 4 * tokens_per_batch // 128)
    for start in range(0, len(wanted), window):
        part = wanted[start : start + window]
        samples = [_ask(dataset.prompt_sample(i, answer), letters.tail) for i in part]
        if replace_image is not None:
            samples = [
                s if s.image is None else replace(s, image=replace_image(i, s.image))
                for i, s in zip(part, samples, strict=True)
            ]
        found = [0] * len(part)
        lengths, shown = [len(s.input_ids) for s in samples], [s.tiles for s in samples]
        for members in plan_packs(lengths, tokens_per_batch, tiles=shown, modality=form.modality):
            logits = _letter_logits(model, [samples[m] for m in members], load, letter_ids, device)
            for row, member in enumerate(members):
                num_choices = len(dataset.problems[part[member]]["choices"])
                found[member] = int(logits[row, :num_choices].argmax())
        guesses += found
        on_done(len(guesses))
    return guesses


def _ask(prompt: Sample, tail: int) -> Sample:
    """The prompt and an answer up to its letter. The letter is the one target, so the row before it is looked at."""
    ids = prompt.input_ids[: len(prompt.input_ids) - tail]
    return replace(prompt, input_ids=ids, labels=[*[IGNORE] * (len(ids) - 1), ids[-1]])


def _letter_logits(
    model: VisionLanguageModel, samples: list[Sample], load: Callable[[str], Tensor], letter_ids: Tensor,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """[number of samples, number of letters], fp32 on the host."""
    tiles = [None if s.image is None else load(s.image) for s in samples]
    pack = collate(samples, [torch.zeros(len(s.input_ids)) for s in samples], tiles, form=form_of(model.config))
    pack = pack.to(device)
    rows = pack.supervised[: len(samples)]
    hidden = model.hidden(pack).index_select(0, rows)
    return model.logits(hidden).index_select(1, letter_ids).cpu()
