"""Generated answers: who is written with whom, in which order they come back, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import EvalConfig, Legacy, Runtime
from engine.data.layout import Layout
from engine.data.sample import Sample
from engine.data.scienceqa import ScienceQA
from engine.data.tokenizer import Tokenizer, open_tokenizer
from engine.evaluation import scienceqa
from engine.evaluation.scienceqa import Answer
from tests.world import make_scienceqa, make_tokenizer

COUNT = 12


@dataclass
class Writer:
    """Stands for engine.generation.generate: writes `say(qid)`, remembers its batches and what it drew."""

    tokenizer: Tokenizer
    say: Callable[[str], str]
    batches: list[list[str]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def __call__(
        self, model: object, prompts: Sequence[Sample], tiles: Sequence[object], *, sampling: Any,
        generator: torch.Generator, **_: object,
    ) -> list[list[int]]:  # fmt: skip
        assert [tile == "a tile" for tile in tiles] == [bool(p.image_slots) for p in prompts]
        self.batches.append([prompt.id for prompt in prompts])
        self.places.append(len(prompts) * (max(len(p.input_ids) for p in prompts) + sampling.max_new_tokens))
        self.draws.append(float(torch.rand((), generator=generator)))
        return [self.tokenizer.encode(self.say(prompt.id))[1:] for prompt in prompts]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ScienceQA:
    root = tmp_path_factory.mktemp("scienceqa")
    make_scienceqa(root)
    make_tokenizer(root / "tokenizer.model")
    return ScienceQA(root, "test", Layout(open_tokenizer(root / "tokenizer.model"), max_seq_len=512, image_tokens=6))


Written = tuple[list[Answer], Writer]
Write = Callable[..., Written]


@pytest.fixture
def write(dataset: ScienceQA, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Generates the answers `say` to all problems."""

    def run(say: Callable[[str], str], *, tokens: int = 1024, **flags: Any) -> Written:
        writer = Writer(dataset.layout.tokenizer, say)
        monkeypatch.setattr(scienceqa, "generate", writer)
        trained: Any = SimpleNamespace(
            model=None, tokenizer=writer.tokenizer, device=torch.device("cpu"),
            reader=SimpleNamespace(tile=lambda path: "a tile"),
            config=SimpleNamespace(runtime=Runtime(tokens_per_batch=tokens)),
        )  # fmt: skip
        return scienceqa._generate(trained, dataset, EvalConfig(generate=True, **flags), COUNT), writer

    return run


def right(dataset: ScienceQA) -> Callable[[str], str]:
    return lambda qid: f"The answer is {'ABCDE'[dataset.problems[dataset.qids.index(qid)]['answer']]}."


def test_answers_come_back_in_the_order_of_the_data(dataset: ScienceQA, write: Write) -> None:
    answers, writer = write(right(dataset), max_batch_size=4)
    assert [answer.choice for answer in answers] == [problem["answer"] for problem in dataset.problems]
    assert not any(answer.failed for answer in answers)
    order = [qid for batch in writer.batches for qid in batch]
    assert sorted(order) == sorted(dataset.qids) and order != dataset.qids


def test_tokens_and_max_batch_size_bound_a_batch(dataset: ScienceQA, write: Write) -> None:
    few, many = (write(right(dataset), tokens=tokens, max_batch_size=5)[1] for tokens in (600, 100_000))
    assert max(map(len, few.batches)) < 5 and max(few.places) <= 600
    assert [len(batch) for batch in many.batches] == [5, 5, 2]


@pytest.mark.parametrize("switch", ["decode_positions", "clip_router"])
def test_lavins_defects_are_reproduced_in_lavins_batches(dataset: ScienceQA, write: Write, switch: str) -> None:
    answers, writer = write(right(dataset), max_batch_size=5, tokens=128, legacy=Legacy(**{switch: True}))
    assert writer.batches == [dataset.qids[:5], dataset.qids[5:10], dataset.qids[10:]]
    assert [answer.choice for answer in answers] == [problem["answer"] for problem in dataset.problems]


def test_the_batches_share_one_stream_of_random_numbers(dataset: ScienceQA, write: Write) -> None:
    first, again, other = (write(right(dataset), max_batch_size=2, **seed)[1].draws for seed in ({}, {}, {"seed": 2}))
    assert len(set(first)) == len(first) == 6
    assert first == again and first != other
    assert first[0] == float(torch.rand((), generator=torch.Generator().manual_seed(1)))  # LaVIN's seed


def test_what_names_no_choice_failed(write: Write) -> None:
    answers, _ = write(lambda qid: "It is blue.")
    assert [(answer.choice, answer.failed) for answer in answers] == [(-1, True)] * COUNT


def test_lavins_guesses_count_as_failed_and_do_not_depend_on_the_batches(write: Write) -> None:
    def say(qid: str) -> str:
        return "The answer is B, blue" if int(qid) % 3 == 0 else "It is blue."

    legacy = Legacy(score_whole_text=True)
    answers, _ = write(say, legacy=legacy)
    assert write(say, legacy=legacy, max_batch_size=1)[0] == answers
    assert {answer.failed for answer in answers} == {True, False}
    assert all(answer.failed for answer in write(say)[0]), "only LaVIN's pattern takes anything for a dot"
    assert all(answer.choice in (0, 1, 2) for answer in answers)
    assert len({answer.choice for answer in answers if answer.failed}) > 1
