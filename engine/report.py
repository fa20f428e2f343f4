"""The end of a run: metrics_final.json, REPORT.md and what the terminal shows, all from one set of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.evaluation.score import GROUPS, percent
from engine.files import write_atomic
from engine.progress import duration
from engine.rundir import write_json

SCORES = tuple(GROUPS)
FILES = {
    "config.yaml": "every setting, as it was used",
    "command.txt": "what was typed",
    "metrics.jsonl": "the numbers of each logged step",
    "metrics.csv": "the same as a table",
    "loss.svg": "the loss curve",
    "log.txt": "everything that was logged",
    "latest": "the newest checkpoint's name",
    "metrics_final.json": "the numbers of this page",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalMetrics:
    """What a finished run measured; the fields are the keys of metrics_final.json."""

    accuracy: Mapping[str, float]  # percent by SCORES; empty where nothing was scored
    accuracy_before: Mapping[str, float]  # the same, before the first step
    loss: float  # moving average at the end
    steps: int
    samples_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    packing_efficiency: float  # filled fraction of the packs
    trainable_parameters: int
    wall_seconds: float
    device: str

    def __post_init__(self) -> None:
        for name in ("accuracy", "accuracy_before"):
            got = getattr(self, name)
            if got and set(got) != set(SCORES):
                raise ValueError(f"{name} has the keys {sorted(got)}; accepted: {', '.join(SCORES)}, or none at all")


def write_final_metrics(path: Path, final: FinalMetrics) -> None:
    """metrics_final.json: exactly the fields above. A number that is not finite is null."""
    write_json(path, {key: _jsonable(value) for key, value in asdict(final).items()})


def write_report(
    path: Path, title: str, final: FinalMetrics, next_commands: Sequence[str], remarks: Sequence[str] = ()
) -> None:
    """REPORT.md beside the files it names. `remarks` are sentences about the data."""
    lines = [f"# {title}", ""]
    if final.accuracy:
        lines += ["Accuracy in percent.", "", *_markdown(_score_rows(final)), ""]
    lines += _markdown([("", ""), *_figures(final)])
    for remark in remarks:
        lines += ["", f"{remark}."]
    if (path.parent / "loss.svg").exists():
        lines += ["", "![loss](loss.svg)"]
    present = [(f"[{name}]({name})", text) for name, text in FILES.items() if (path.parent / name).exists()]
    if present:
        lines += ["", "## Files", "", *_markdown([("file", "holds"), *present])]
    if next_commands:
        lines += ["", "## Next", "", "```", *next_commands, "```"]
    write_atomic(path, "\n".join(lines) + "\n")


def terminal_report(title: str, final: FinalMetrics, report: Path, next_commands: Sequence[str]) -> str:
    """The same for the terminal: plain text, at most 80 columns wide (but for the commands)."""
    lines = ["", title, "-" * len(title)]
    if final.accuracy:
        lines += [*_aligned(_score_rows(final)), ""]
    lines += _aligned(_figures(final))
    lines += [f"report: {report}"]
    if next_commands:
        lines += ["", "next:", *(f"  {command}" for command in next_commands)]
    return "\n".join(lines) + "\n"


def _score_rows(final: FinalMetrics) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", *SCORES)]
    for name, scores in (("before", final.accuracy_before), ("after", final.accuracy)):
        if scores:
            rows.append((name, *(percent(scores[key]) for key in SCORES)))
    return rows


def _figures(final: FinalMetrics) -> list[tuple[str, ...]]:
    return [
        ("loss", f"{final.loss:.4f}"),
        ("steps", f"{final.steps:,}"),
        ("time", duration(final.wall_seconds)),
        ("speed", f"{final.tokens_per_second:,.0f} tokens/s, {final.samples_per_second:,.1f} samples/s"),
        ("packs filled", f"{100 * final.packing_efficiency:.1f} %"),
        ("peak memory", f"{final.peak_memory_bytes / 2**20:,.0f} MiB"),
        ("trainable", f"{final.trainable_parameters:,} parameters"),
        ("device", final.device),
    ]


def _markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their longest cell; numbers to the right, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    is_table = len(widths) > 2
    lines = []
    for row in rows:
        rest = [cell.rjust(w) if is_table else cell for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return lines


def _jsonable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {key: _jsonable(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
