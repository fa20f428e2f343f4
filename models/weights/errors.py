"""The one error of this folder: a weight file that is missing, damaged, forbidden, or of another model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SHOWN = 10  # names of each list that the message shows


class WeightsError(ValueError):
    """Says which file, what is wrong with it, which tensors, and what to do.

    `missing` are expected and not in the file, `extra` are in the file and not known, `mismatched` are "name: got this,
    expected that"; names are the file's own where a file was read. The message shows the first few of each.
    """

    def __init__(
        self, file: str | Path, what: str = "its tensors are not those of the model", *, do: str = "",
        missing: Sequence[str] = (), extra: Sequence[str] = (), mismatched: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(str(file), what)  # the rest lives in __dict__, so that the error survives a process border
        self.file = str(file)
        self.what = what
        self.do = do
        self.missing = list(missing)
        self.extra = list(extra)
        self.mismatched = list(mismatched)

    def __str__(self) -> str:
        lines = [self.what, f"  where: {self.file}"]
        lists = (("missing", self.missing), ("extra", self.extra), ("mismatched", self.mismatched))
        lines += [f"  {label} ({len(names)}): {_shorten(names)}" for label, names in lists if names]
        if self.do:
            lines.append(f"  do: {self.do}")
        return "\n".join(lines)


def _shorten(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
