"""What is said of every family of language models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from models.language.config import DecoderConfig
from models.weights.names import Names
from models.weights.settings import Settings


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which files hold a family. A file that holds all of `marks` has this layout."""

    marks: tuple[str, ...]  # names in the file
    names: Callable[[DecoderConfig], Names]


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family's files come from: the settings that name it, and its layouts, the usual one first."""

    name: str  # as DecoderConfig.family
    model_types: frozenset[str]  # values of config.json's model_type
    config_of: Callable[[Settings], DecoderConfig]  # refuses by key and value what our model does not compute
    settings_of: Callable[[DecoderConfig], dict[str, object]]  # the config.json that transformers reads
    layouts: tuple[Layout, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)  # transformers', for files that leave them out

    def layout_in(self, held: Collection[str]) -> Layout | None:
        """The layout of a file that holds these names, None where it has none of them."""
        return next((layout for layout in self.layouts if all(mark in held for mark in layout.marks)), None)
