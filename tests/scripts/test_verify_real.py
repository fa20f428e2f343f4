from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import CheckpointError, DataError
from engine.flags import parse_eval
from scripts import verify_real


def lay_out(folder: Path) -> list[str]:
    """Empty files where the real ones would be, and the flags that name them."""
    for name in ("W/7B", "W/13B", "D/images/test", "D/weights/vicuna_7B"):
        (folder / name).mkdir(parents=True)
    for name in ("W/tokenizer.model", "D/problems.json", "D/pid_splits.json", "a.pth"):
        (folder / name).touch()
    paths = {"llama_model_path": "W", "data_root": "D", "adapter_path": "a.pth"}
    return [f"--{flag}={folder / path}" for flag, path in paths.items()]


@pytest.mark.parametrize(
    ("model", "accuracy", "code", "verdict"),
    [
        ("7b-lite", 88.84, 0, "PASS 7b-lite: 88.84 % on ScienceQA test, published 88.35 %, tolerance 0.5"),
        ("7b-lite", 88.86, 1, "FAIL 7b-lite: 88.86 %"),
        ("13b", 90.03, 1, "FAIL 13b: 90.03 %"),
        ("13b", 90.05, 0, "PASS 13b: 90.05 %"),
    ],
)
def test_verdict(
    model: str, accuracy: float, code: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(verify_real, "evaluate", lambda line: accuracy)
    assert verify_real.main([*lay_out(tmp_path), "--model", model]) == code
    assert verdict in capsys.readouterr().out


def test_line_is_one_that_eval_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(verify_real, "evaluate", lambda line: lines.append(line) or 89.41)
    flags = ["--model", "vicuna-7b", "--bits", "4bit", "--runtime.tokens_per_batch", "4096"]
    verify_real.main([*lay_out(tmp_path), *flags])
    config, notes = parse_eval(lines[0])
    assert (config.bits, config.split, config.generate, config.adapter.temperature) == ("4bit", "test", True, 10.0)
    assert config.model.language == str(tmp_path / "W/7B")
    assert config.model.delta == str(tmp_path / "D/weights/vicuna_7B")
    assert config.legacy.vicuna_permutation
    assert config.runtime.tokens_per_batch == 4096
    assert notes == []


@pytest.mark.parametrize(
    ("missing", "error"),
    [("a.pth", CheckpointError), ("W/tokenizer.model", CheckpointError), ("D/problems.json", DataError)],
)
def test_missing_file_is_named(missing: str, error: type[Exception], tmp_path: Path) -> None:
    flags = lay_out(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(error, match=str(tmp_path / missing)):
        verify_real.main(flags)


def test_code_of_a_failed_evaluation_is_passed_on() -> None:
    with pytest.raises(SystemExit) as stopped:
        verify_real.evaluate(["--no-such-flag"])
    assert stopped.value.code == 2
