from __future__ import annotations

import pickle

from models.weights.errors import WeightsError


def test_the_message_says_which_file_which_tensors_and_what_to_do() -> None:
    error = WeightsError("w.pth", missing=["a"], extra=[f"e{i}" for i in range(12)], mismatched=["b: got 2"], do="this")
    text = str(error)
    assert text.splitlines()[1:] == [
        "  where: w.pth",
        "  missing (1): a",
        "  extra (12): e0, e1, e2, e3, e4, e5, e6, e7, e8, e9 and 2 more",
        "  mismatched (1): b: got 2",
        "  do: this",
    ]
    assert len(error.extra) == 12


def test_it_survives_a_process_border() -> None:
    error = WeightsError("w.pth", "is broken", missing=["a"], do="this")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.missing, copy.file) == (str(error), ["a"], "w.pth")
