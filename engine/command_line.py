"""A command line cut into flags, before anybody knows what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UsageError

TRUE, FALSE = ("True", "true", "1"), ("False", "false", "0")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name without dashes and with underscores, the words that follow it, and how it was typed."""

    name: str
    values: tuple[str, ...]
    typed: str

    @property
    def value(self) -> str:
        """Its single value.

        Raises:
            UsageError: it has none, or several.
        """
        if len(self.values) != 1:
            got = f"{len(self.values)} values: {' '.join(self.values)}" if self.values else "no value"
            raise UsageError(f"{self.typed} has {got}", where=self.typed, do="give it one value")
        return self.values[0]

    @property
    def on(self) -> bool:
        """Whether this switch is on: --plan, --plan=True or --plan True.

        Raises:
            UsageError: it has a value that is no truth value.
        """
        if not self.values:
            return True
        if self.value not in TRUE + FALSE:
            raise UsageError(f"{self.typed} is {self.value!r}", where=self.typed, why="it is a switch: True or False")
        return self.value in TRUE


def split(argv: Sequence[str]) -> list[Flag]:
    """A word with two dashes begins a flag, the words after it are its values; --flag=value is the same.

    Raises:
        UsageError: a word stands before the first flag, or is no flag (-x).
    """
    flags: list[Flag] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            typed, equals, value = word.partition("=")
            flags.append(Flag(typed[2:].replace("-", "_"), (value,) if equals else (), typed))
        elif not flags:
            raise UsageError(f"unexpected {word!r}", where="command line", do="name it with a flag: --help lists them")
        else:
            flags[-1] = Flag(flags[-1].name, (*flags[-1].values, word), flags[-1].typed)
    return flags
