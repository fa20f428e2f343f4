from __future__ import annotations

import pickle

import pytest

from engine import errors


def test_message_has_its_four_parts_and_leaves_out_empty_ones() -> None:
    error = errors.DataError("row 3 has no image: 'a.png'", where="my.json, row 3", do="pass --image_folder")
    assert str(error) == (
        "error[data]: row 3 has no image: 'a.png'\n  where: my.json, row 3\n  do: pass --image_folder"
    )


def test_exit_codes_are_the_promised_ones() -> None:
    names = ("UsageError", "DataError", "EnvironmentProblem", "OutOfMemory", "NotFinite", "CheckpointError", "Stopped")
    assert [getattr(errors, name).exit_code for name in names] == [2, 3, 4, 5, 6, 7, 75]


def test_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(errors.DataError("what", where="here", why="because", do="this")))
    assert str(error) == "error[data]: what\n  where: here\n  why: because\n  do: this"


def raiser(error: BaseException):  # type: ignore[no-untyped-def]
    def main(argv: list[str]) -> int:
        raise error

    return main


class WeightsError(ValueError):
    """Stands for models.weights.errors.WeightsError, which is recognised by its name."""


class MissingTensors(WeightsError):
    pass


class OutOfMemoryError(RuntimeError):
    """Stands for torch.cuda.OutOfMemoryError."""


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (errors.UsageError("bad"), 2, "usage"),
        (WeightsError("bad"), 7, "checkpoint"),
        (MissingTensors("bad"), 7, "checkpoint"),
        (OutOfMemoryError("bad"), 5, "memory"),
    ],
)
def test_known_error_prints_its_message_and_no_traceback(
    error: Exception, code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run_command(raiser(error), []) == code
    assert capsys.readouterr().err == f"error[{kind}]: bad\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run_command(raiser(errors.UsageError("bad")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unknown_error_is_raised() -> None:
    with pytest.raises(ValueError, match="a defect"):
        errors.run_command(raiser(ValueError("a defect")), [])


def test_interrupt_ends_with_the_code_of_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run_command(raiser(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_code_of_main_is_passed_on_and_none_means_success() -> None:
    assert errors.run_command(lambda argv: 3, []) == 3
    assert errors.run_command(lambda argv: None, []) == 0
