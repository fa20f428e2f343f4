from __future__ import annotations

import json

import pytest

from engine.report import SCORES, FinalMetrics, terminal_report, write_final_metrics, write_report

NEXT = ["python eval.py --run runs/demo --task scienceqa", "python chat.py --run runs/demo --image picture.png"]


def final(**changes) -> FinalMetrics:
    values = dict(
        accuracy={name: 80.0 + i for i, name in enumerate(SCORES)},
        accuracy_before={name: 20.0 + i for i, name in enumerate(SCORES)},
        loss=0.1234, steps=1234, samples_per_second=56.7, tokens_per_second=8901.2, peak_memory_bytes=512 * 2**20,
        packing_efficiency=0.966, trainable_parameters=4_012_345, wall_seconds=185.0, device="cpu (x86_64)",
    )  # fmt: skip
    return FinalMetrics(**{**values, **changes})


def test_metrics_final_has_exactly_the_promised_keys(tmp_path):
    write_final_metrics(tmp_path / "m.json", final(loss=float("nan")))
    written = json.loads((tmp_path / "m.json").read_text())
    assert set(written) == {
        "accuracy", "accuracy_before", "loss", "steps", "samples_per_second", "tokens_per_second", "peak_memory_bytes",
        "packing_efficiency", "trainable_parameters", "wall_seconds", "device",
    }  # fmt: skip
    assert set(written["accuracy"]) == {"average", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"}
    assert written["loss"] is None
    assert written["peak_memory_bytes"] == 512 * 2**20


def test_scores_are_complete_or_absent():
    with pytest.raises(ValueError, match="accuracy_before has the keys"):
        final(accuracy_before={"NAT": 1.0})
    final(accuracy={}, accuracy_before={})


def test_the_report_shows_scores_figures_files_and_commands(tmp_path):
    for name in ("config.yaml", "loss.svg"):
        (tmp_path / name).write_text("x")
    write_report(tmp_path / "REPORT.md", "demo", final(), NEXT)
    text = (tmp_path / "REPORT.md").read_text()
    assert "| after | 80.00 | 81.00 | 82.00 | 83.00 | 84.00 | 85.00 | 86.00 | 87.00 | 88.00 |" in text
    assert "| before | 20.00 |" in text
    assert "![loss](loss.svg)" in text
    assert "[config.yaml](config.yaml)" in text
    assert "metrics.csv" not in text  # only what is there
    assert "3:05 min" in text
    assert "96.6 %" in text
    assert "512 MiB" in text
    assert "\n".join(NEXT) in text
    table = [line for line in text.splitlines() if line.startswith("|")][:3]
    assert len({line.count("|") for line in table}) == 1


def test_a_run_without_scores_has_no_score_table(tmp_path):
    bare = final(accuracy={}, accuracy_before={})
    write_report(tmp_path / "REPORT.md", "mine", bare, [])
    text = (tmp_path / "REPORT.md").read_text()
    assert "NAT" not in text
    assert "## Next" not in text
    assert "NAT" not in terminal_report("mine", bare, tmp_path / "REPORT.md", [])


def test_the_terminal_gets_the_same_in_80_columns(tmp_path):
    text = terminal_report("demo", final(accuracy=dict.fromkeys(SCORES, 100.0)), tmp_path / "REPORT.md", NEXT)
    head, before, after = (line for line in text.splitlines() if line.startswith((" ", "before", "after"))
                           and "python" not in line)  # fmt: skip
    assert head.split() == list(SCORES)
    assert len(head) == len(before) == len(after) <= 80
    assert after.split() == ["after"] + ["100.00"] * 9
    assert all(f"  {command}" in text for command in NEXT)
