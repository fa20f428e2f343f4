"""Where the numbers of a run go: metrics.jsonl, metrics.csv and, when asked for, TensorBoard.

A resumed run's files read as one run: lines after the step it resumed from are cut first.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EnvironmentProblem
from engine.files import write_atomic

logger = logging.getLogger("nibble")

Value = float | int | str | None

COLUMNS = (
    "step",  # updates done
    "epoch",  # fractional
    "samples",  # since the start of the run
    "tokens",  # since the start of the run
    "loss",
    "loss_ema",
    "eval_loss",
    "lr",
    "grad_norm",  # before clipping
    "loss_scale",
    "step_ms",
    "data_ms",  # of step_ms, waiting for data
    "tok_s",
    "samples_s",
    "packing",  # filled fraction of the packs
)


class Ema:
    """Exponential moving average, unbiased from its first value on: sum of b^k x_(n-k) over sum of b^k."""

    def __init__(self, beta: float = 0.98) -> None:
        self.beta = beta
        self.total = 0.0
        self.weight = 0.0

    def update(self, value: float) -> float:
        self.total = self.beta * self.total + (1 - self.beta) * value
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.value

    @property
    def value(self) -> float:
        """The average so far; NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan

    def state(self) -> dict[str, float]:
        """For the checkpoint's JSON."""
        return {"total": self.total, "weight": self.weight}

    def load(self, state: Mapping[str, float]) -> None:
        self.total, self.weight = state["total"], state["weight"]


class MetricSink(Protocol):
    """Takes one row at a time. Keys are among COLUMNS."""

    def write(self, row: Mapping[str, Value]) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, with the keys that the row has. A number that is not finite is null: JSON has none.

    earlier: the rows to begin with; whatever else the file holds goes.
    """

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Value]] = ()) -> None:
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in earlier))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time: `tail -f` works

    def write(self, row: Mapping[str, Value]) -> None:
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


class CsvSink:
    """The same rows under fixed columns, empty where a row has no value."""

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Value]] = ()) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(earlier)
        write_atomic(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", buffering=1, newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, row: Mapping[str, Value]) -> None:
        self._writer.writerow({key: _finite(value) for key, value in row.items()})

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars by column name, x = step. Needs the extra [log]."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                "--log.tensorboard needs the package tensorboard",
                why=str(error),
                do="pip install tensorboard (it is part of the extra [log])",
            ) from error
        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def write(self, row: Mapping[str, Value]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Metrics:
    """The sinks of a run behind one write().

    folder: the run directory. resume_step: the step of the checkpoint that the run continues from; None begins anew.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, tensorboard: bool = False) -> None:
        path = folder / "metrics.jsonl"
        earlier = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        self.sinks: list[MetricSink] = [JsonlSink(path, earlier), CsvSink(folder / "metrics.csv", earlier)]
        if tensorboard:
            self.sinks.append(TensorBoardSink(folder / "tensorboard", resume_step))

    def write(self, step: int, **values: Value) -> None:
        """Append one row.

        Raises:
            ValueError: a key that is not in COLUMNS.
        """
        if unknown := values.keys() - set(COLUMNS):
            raise ValueError(f"unknown metric {', '.join(sorted(unknown))}; accepted: {', '.join(COLUMNS)}")
        for sink in self.sinks:
            sink.write({"step": step, **values})

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; none where there is no file.

    A line that a killed process left half-written is named in the log and left out.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            logger.warning("%s line %d is not a row of metrics and was left out", path, number)
    return rows


def series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have this key: what engine.plot draws."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
