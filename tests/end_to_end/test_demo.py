"""The embedded demo, whole: what `make demo` trains, and that its pictures must be looked at."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import chat
import eval as eval_command
import train
from engine.build import open_scienceqa
from engine.config import Runtime
from engine.data.prompts import question_with_options
from engine.errors import run_command
from engine.evaluation.letters import predict
from engine.evaluation.score import chance
from engine.trained import Trained, open_trained, run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One training of the demo, in a cache of its own: half a minute to two minutes."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIBBLE_CACHE", str(folder / "cache"))
        assert run_command(train.main, ["--bits", "4bit", "--output_dir", str(folder / "run")]) == 0
        yield folder / "run"


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return open_trained(run_config(str(run), Runtime()), run)


def test_it_learns_what_the_base_did_not_know(run: Path) -> None:
    final = json.loads((run / "metrics_final.json").read_text())
    assert final["accuracy"]["average"] >= 90
    assert final["accuracy"]["IMG"] >= 90
    assert final["trainable_parameters"] < 50_000
    assert abs(final["accuracy_before"]["IMG"] - 34) < 10  # chance on image questions is 34 %: see below


def image_accuracy(trained: Trained, instead: list[str] | None) -> tuple[float, float]:
    """Accuracy on image questions with other pictures in the place of their own, and that of guessing; in percent."""
    dataset = open_scienceqa(trained.config, trained.tokenizer, "test", trained.model.config)
    asked = [i for i, problem in enumerate(dataset.problems) if problem["image"]]
    pictures = dict(zip(asked, instead, strict=True)) if instead else {}
    guesses = predict(
        trained.model, dataset, trained.reader.tile, tokens_per_batch=2048, device=trained.device, indices=asked,
        replace_image=pictures.get,
    )  # fmt: skip
    problems = [dataset.problems[i] for i in asked]
    hits = sum(p["answer"] == guess for p, guess in zip(problems, guesses, strict=True))
    return 100 * hits / len(asked), chance(problems)


def test_without_its_picture_an_image_question_is_a_guess(trained: Trained, tmp_path: Path) -> None:
    own, by_chance = image_accuracy(trained, None)
    assert own >= 90 and 30 < by_chance < 40
    dataset = open_scienceqa(trained.config, trained.tokenizer, "test", trained.model.config)
    pictures = [image for i in range(len(dataset)) if (image := dataset.sample(i).image) is not None]
    Image.new("RGB", (96, 96), (128, 128, 128)).save(tmp_path / "blank.png")
    shuffled = random.Random(0).sample(pictures, len(pictures))
    for instead in ([str(tmp_path / "blank.png")] * len(pictures), shuffled):
        accuracy, _ = image_accuracy(trained, instead)
        assert abs(accuracy - by_chance) <= 10


def test_evaluation_gives_the_same_table_by_letters_and_nearly_so_by_generation(run: Path) -> None:
    final = json.loads((run / "metrics_final.json").read_text())["accuracy"]
    assert run_command(eval_command.main, ["--run", str(run)]) == 0
    scored = json.loads((run / "eval-scienceqa-test.json").read_text())
    assert scored["accuracy"]["average"] == pytest.approx(final["average"], abs=1e-3) and scored["failed"] == 0
    line = ["--run", str(run), "--generate", "--num", "100", "--generation_temperature", "0", "--max_new_tokens", "6"]
    assert run_command(eval_command.main, [*line, "--output", str(run / "generated.json")]) == 0
    generated = json.loads((run / "generated.json").read_text())
    first = {qid: scored["predictions"][qid] for qid in generated["predictions"]}
    assert sum(first[qid] == guess for qid, guess in generated["predictions"].items()) >= 98


def test_it_answers_a_question_about_a_picture(run: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_scienceqa(trained.config, trained.tokenizer, "test", trained.model.config)
    index = next(i for i, problem in enumerate(dataset.problems) if problem["question"] == "How many balls are there?")
    problem, image = dataset.problems[index], dataset.sample(index).image
    question = question_with_options(problem)
    line = ["--run", str(run), "--image", str(image), "--question", question, "--temperature", "0"]
    assert run_command(chat.main, line) == 0
    answer = capsys.readouterr().out.strip()
    assert answer.startswith(f"The answer is {'ABCDE'[problem['answer']]}. BECAUSE: {problem['lecture']}")
