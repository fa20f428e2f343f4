"""`did you mean`, in one place for flags and for the keys of a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar known name, or None where nothing is similar.

    A name without its group ("lr") is compared with the last part of the paths too, so that it finds "optim.lr".
    """
    paths = list(known)
    by_last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    exact = by_last.get(name.rpartition(".")[2])
    if exact is not None:
        return exact
    close = difflib.get_close_matches(name, [*paths, *by_last], n=1, cutoff=0.6)
    return by_last.get(close[0], close[0]) if close else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean --optim.lr?` (with prefix "--"), or an empty string where nothing is similar."""
    match = closest(name, known)
    return f"did you mean {prefix}{match}?" if match else ""
