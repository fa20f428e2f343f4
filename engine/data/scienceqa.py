"""ScienceQA as LaVIN lays it out: problems.json, pid_splits.json, captions.json, images/{split}/{qid}/image.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.data import prompts
from engine.data.fields import read_json, take
from engine.data.images import resolve
from engine.data.layout import Layout
from engine.data.sample import Sample
from engine.errors import DataError, UsageError

SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest")
_TEXTS = ("question", "hint", "lecture", "solution", "grade", "subject", "split")


class ScienceQA:
    """The problems of one split. `qids` and `problems` (as in the file, checked) stay readable for evaluation.

    Everything is checked here, images for their presence, so that a run does not stop hours later.

    Raises:
        DataError: a file, an entry, a key or an image is missing or of another shape; names file and entry.
        UsageError: unknown split or prompt format.
    """

    def __init__(
        self, root: str | Path, split: str, layout: Layout, *, prompt_format: str = "QCM-ALE", options: str = "ABCDE",
        use_caption: bool = False, captions: str | Path = "",
    ) -> None:  # fmt: skip
        prompts.check_format(prompt_format)
        if split not in SPLITS:
            raise UsageError(
                f"unknown split {split!r}", where="--dataset.split", do=f"choose one of {', '.join(SPLITS)}"
            )
        self.root = Path(root)
        self.layout = layout
        self.prompt_format = prompt_format
        self.options = options
        self._problems_file = self.root / "problems.json"
        self.qids = _qids(self.root / "pid_splits.json", split)
        entries = _read(self._problems_file)
        self.problems: list[Mapping[str, Any]] = [take(entries, q, dict, str(self._problems_file)) for q in self.qids]
        for index in range(len(self)):
            self._check(index)
        self._images = [self._find_image(index) for index in range(len(self))]
        self._captions = _captions(Path(captions or self.root / "captions.json")) if use_caption else {}

    def __len__(self) -> int:
        return len(self.qids)

    def where(self, index: int) -> str:
        return f"{self._problems_file}, problem {self.qids[index]}"

    def prompt(self, index: int) -> str:
        """The question as text, ending in `Response:`."""
        caption = self._captions.get(self.qids[index], "")
        return prompts.prompt(self.problems[index], self.prompt_format, self.options, caption)

    def target(self, index: int) -> str:
        """The answer and its explanation as text."""
        return prompts.target(self.problems[index], self.prompt_format, self.options)

    def sample(self, index: int) -> Sample:
        """Prompt and target, laid out for training."""
        return self.layout.pair(self.qids[index], self.prompt(index), self.target(index), self._images[index])

    def prompt_sample(self, index: int, beginning: str = "") -> Sample:
        """The prompt alone, for evaluation; `beginning` is text of the answer that the model is given."""
        return self.layout.prompt_only(self.qids[index], self.prompt(index) + beginning, self._images[index])

    def _check(self, index: int) -> None:
        problem, where = self.problems[index], self.where(index)
        for key in _TEXTS:
            take(problem, key, str, where)
        take(problem, "image", (str, type(None)), where)
        choices = take(problem, "choices", list, where)
        if not 1 <= len(choices) <= len(self.options) or not all(isinstance(choice, str) for choice in choices):
            raise DataError(
                f"'choices' must be a list of 1 to {len(self.options)} texts, got {choices!r}",
                where=where,
                why=f"the options are {self.options}",
            )
        answer = take(problem, "answer", int, where)
        if not 0 <= answer < len(choices):
            raise DataError(f"'answer' must be 0 to {len(choices) - 1}, got {answer}", where=where)

    def _find_image(self, index: int) -> str | None:
        problem, where = self.problems[index], self.where(index)
        if problem["image"] is None:
            return None
        if problem["split"] not in ("train", "val", "test"):
            raise DataError(f"'split' must be train, val or test, got {problem['split']!r}", where=where)
        return resolve(str(self.root / "images" / problem["split"]), f"{self.qids[index]}/image.png", where)


def _read(path: Path) -> Any:
    do = "name the folder that holds problems.json and pid_splits.json with --dataset.root"
    return read_json(path, do)


def _qids(path: Path, split: str) -> list[str]:
    qids: list[str] = take(_read(path), split, list, str(path))
    for qid in qids:
        if not isinstance(qid, str):
            raise DataError(f"split {split!r} must list problem ids as text, got {qid!r}", where=str(path))
    if not qids:
        raise DataError(f"split {split!r} is empty", where=str(path))
    return qids


def _captions(path: Path) -> dict[str, str]:
    do = "get captions.json of the ScienceQA repository, or leave out --dataset.use_caption"
    captions: dict[str, str] = take(read_json(path, do), "captions", dict, str(path))
    for qid in captions:
        take(captions, qid, str, f"{path}, captions")
    return captions
