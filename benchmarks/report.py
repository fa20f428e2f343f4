"""Makes benchmarks/README.md from the rows: the goals, then tables and plots of each card's latest runs.

    python -m benchmarks.report            writes README.md and plots/*.svg
    python -m benchmarks.report --check    fails where they are not what the rows give
    python -m benchmarks.report --json     prints the goals as data

No GPU is needed. A missed goal's line shows what limits it, from limits.json ({"G4": "..."}).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import predictions
from benchmarks.conditions import Verdict, judge
from benchmarks.goals import GOALS
from benchmarks.plot import bars
from benchmarks.rows import MODES, Row, latest, read

FOLDER = Path(__file__).parent
GOALS_CARD = "H200"  # the goals are set for it; where no row is from one, the card of the latest row stands in
OURS_FIRST = "nibble"

HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from the rows in `results/`; do not edit it.

    python -m benchmarks.suite              csrc, GPU tests, kernels, whole steps; rows go to benchmarks/results
    python -m benchmarks.suite --quick      the goals' cases only, what matters most first, for 8 minutes at most
    python -m benchmarks.suite --tiny       tiny sizes, on a CPU too: whether it runs, no figures
    python -m benchmarks.rms_norm           one benchmark alone; --list shows its cases, --case WORDS takes some
    python -m benchmarks.report             this file again, with the new rows

With half an hour on a card, in this order; each line stops by itself, with what it has. Of a case the run counts that
measured it last, so lines may be repeated alone (where the tree is a copy without git: --commit). Peers that are not
installed (bitsandbytes, peft with transformers, liger-kernel) are told as not measured. How long a line takes is
predicted, not measured (families: 180 s of its line's 480).

    python -m benchmarks.suite --seconds 480 --only csrc end_to_end --case model=7B
    python -m benchmarks.suite --seconds 420 --only csrc end_to_end --case model=13B
    python -m benchmarks.suite --seconds 480 --quick --only csrc tests step parity packing families
    python -m benchmarks.suite --seconds 400 --quick --only csrc kernels
    python -m benchmarks.report

Every variant is checked against the fp32 reference, then timed by CUDA events in turns with the others: median, in
brackets the 20 % and 80 % quantiles, of passes over sets of random inputs that outgrow the L2 cache. Percentages are of
the card's own copy bandwidth or matrix rate, measured in the same process; what is counted as bytes or operations
stands at the head of each benchmark's file. `copy` moves the same bytes and does nothing else.

Whole optimiser steps (packing, end_to_end, parity, families) are timed by the host's clock, from an idle device to an
idle one; what each trainer does, and how its memory is counted, stands at the head of benchmarks/end_to_end.py, of
whole_steps.py, of families.py and of each peer's file. Their percentages are MFU4: 4 operations a weight and real
token, nothing else.
"""

PREDICTED = """## Predictions

Not measured: what the NF4 kernels should take, by `benchmarks/predictions.py`, which says from what.
"""


def main(argv: list[str]) -> int:
    """Returns 0; 1 where --check finds a difference or a row is none."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the goals as data and write nothing")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="has results/, limits.json, README.md and plots/")
    flags = parser.parse_args(argv)
    try:
        rows = latest(read(flags.folder / "results"))
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    if flags.json:
        print(json.dumps({"goals": [verdict.flat() for verdict in verdicts(rows)]}, indent=1))
        return 0
    files = render(rows, limits(flags.folder))
    stale = [name for name, text in files.items() if _text(flags.folder / name) != text]
    stale += [f"plots/{path.name}" for path in _plots(flags.folder) if f"plots/{path.name}" not in files]
    if flags.check:
        for name in stale:
            print(f"{flags.folder / name} is not what the rows give: python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for path in _plots(flags.folder):
        path.unlink()
    for name, text in files.items():
        (flags.folder / name).parent.mkdir(exist_ok=True)
        (flags.folder / name).write_text(text, encoding="utf-8")
    return 0


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal, judged on one card."""
    card = goals_card(rows)
    return [judge(goal, [row for row in rows if row.origin.gpu == card]) for goal in GOALS]


def goals_card(rows: Sequence[Row]) -> str | None:
    """The card whose rows the goals are judged on."""
    newest = sorted(rows, key=lambda row: (GOALS_CARD in row.origin.gpu, row.origin.date))
    return newest[-1].origin.gpu if newest else None


def limits(folder: Path) -> dict[str, str]:
    """What limits a goal, by id; empty without the file."""
    path = folder / "limits.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def render(rows: Sequence[Row], notes: dict[str, str]) -> dict[str, str]:
    """Text by file name: README.md and its plots."""
    files: dict[str, str] = {}
    parts = [HEAD, _goals(rows, notes), PREDICTED, "\n".join(predictions.table()) + "\n"]
    for card in sorted({row.origin.gpu for row in rows}):
        of_card = [row for row in rows if row.origin.gpu == card]
        parts.append(f"## {card}\n")
        for bench in dict.fromkeys(row.bench for row in sorted(of_card, key=lambda row: row.bench)):
            of_bench = [row for row in of_card if row.bench == bench]
            parts.append(f"### {bench}\n\n{_origins(of_bench)}\n")
            plot = bars(of_bench, f"{bench}, {card}")
            if plot:
                name = f"plots/{_slug(card)}-{bench}.svg"
                files[name] = plot
                parts.append(f"![{bench}: share of the card's rate]({name})\n")
            parts += [_table(of_bench, mode) for mode in MODES if any(row.mode == mode and row.ms for row in of_bench)]
            parts += _whole_steps(of_bench)
            parts += _failures(of_bench)
    return {"README.md": "\n".join(parts), **files}


def _goals(rows: Sequence[Row], notes: dict[str, str]) -> str:
    card = goals_card(rows)
    told = f"Judged on {card}." if card else "No rows are recorded yet: every goal stands as not measured."
    lines = ["## Goals\n", f"{told}\n", "| | goal | | measured |", "|---|---|---|---|"]
    for verdict in verdicts(rows):
        goal, measured = verdict.goal, verdict.measured or (f"needs {verdict.goal.needs}" if verdict.goal.needs else "")
        if verdict.status == "missed" and goal.id in notes:
            measured += f". Limit: {notes[goal.id]}"
        lines.append(f"| {goal.id} | {_cell(goal.text)} | {verdict.status.replace('_', ' ')} | {_cell(measured)} |")
    return "\n".join(lines) + "\n"


def _origins(rows: Sequence[Row]) -> str:
    """Where and when the rows were measured; one line unless a run mixed versions."""
    lines = []
    for row in rows:
        o = row.origin
        commit = f"{o.commit}{', tree changed since' if o.dirty else ''}"
        lines.append(
            f"{o.date[:10]}, commit {commit}; driver {o.driver}, torch {o.torch}, triton {o.triton}, "
            f"Python {o.python}; copy {o.copy_gbps:.0f} GB/s, matrix product {o.matrix_tflops:.0f} TFLOP/s; run {o.run}"
        )
    return "\n\n".join(dict.fromkeys(lines))


def _table(rows: Sequence[Row], mode: str) -> str:
    """A line a case, a column a variant; what ours allocates, launches and costs the host at the end."""
    measured = {(row.name, row.variant): row for row in rows if row.mode == mode and row.ms is not None}
    variants = sorted({variant for _, variant in measured}, key=lambda name: (not name.startswith(OURS_FIRST), name))
    lines = [
        f"| {mode}, ms | {' | '.join(variants)} | our extra MB | our launches | our host us |",
        "|---" * (len(variants) + 4) + "|",
    ]
    for case in dict.fromkeys(row.name for row in rows):
        cells = [measured.get((case, variant)) for variant in variants]
        if any(cells):
            lines.append(f"| {case} | {' | '.join(map(_time, cells))} | {_ours(measured.get((case, OURS_FIRST)))} |")
    return "\n".join(lines) + "\n"


def _time(row: Row | None) -> str:
    if row is None or row.ms is None:
        return ""
    share = "" if row.fraction is None else f" {row.fraction:.0%}"
    calls = " (stream)" if row.timing == "stream" else ""
    return f"{row.ms:.4g} [{row.ms_q20:.4g}, {row.ms_q80:.4g}]{share}{calls}"


def _ours(row: Row | None) -> str:
    if row is None or row.extra_bytes is None or row.host_us is None:
        return " | | "
    launches = "" if row.launches is None else str(row.launches)
    return f"{row.extra_bytes / 1e6:.1f} | {launches} | {row.host_us:.0f}"


def _whole_steps(rows: Sequence[Row]) -> list[str]:
    """A line a trainer and case: speed, memory, idleness; the plan's figures, where there are any, in brackets."""
    found = [row for row in rows if row.samples_per_s is not None]
    if not found:
        return []
    lines = [
        "| case | trainer | samples/s | tokens/s | MFU4 | allocated GiB | device GiB | idle | host syncs | policy |",
        "|---" * 10 + "|",
    ]
    cases = {name: place for place, name in enumerate(dict.fromkeys(row.name for row in found))}
    for row in sorted(found, key=lambda row: (cases[row.name], row.variant != OURS_FIRST)):
        cells = [
            row.name, row.variant, f"{row.samples_per_s:.2f}", _planned(row.tokens_per_s, row.plan_tokens_per_s),
            _percent(row.fraction), _gib(row.allocated_bytes, row.plan_bytes),
            _gib(row.device_bytes), _percent(row.idle),
            "" if row.syncs is None else str(row.syncs), "; ".join(filter(None, (row.policy, row.setting))),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return ["\n".join(lines) + "\n"]


def _planned(measured: float | None, plan: float | None) -> str:
    """Whole numbers."""
    return "" if measured is None else f"{measured:,.0f}" + ("" if plan is None else f" (plan {plan:,.0f})")


def _gib(measured: float | None, plan: float | None = None) -> str:
    if measured is None:
        return ""
    return f"{measured / 2**30:.2f}" + ("" if plan is None else f" (plan {plan / 2**30:.2f})")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _failures(rows: Sequence[Row]) -> list[str]:
    """One line for each variant and reason, with the number of cases."""
    reasons: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row.failure is not None:
            reasons.setdefault((row.variant, row.failure), set()).add(row.name)
    lines = [f"* {variant}: {_cell(why)} ({len(cases)} cases)" for (variant, why), cases in sorted(reasons.items())]
    return ["Not measured:\n", "\n".join(lines) + "\n"] if lines else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def _plots(folder: Path) -> list[Path]:
    return sorted((folder / "plots").glob("*.svg"))


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
