"""The models within a checkpoint, told apart by how their tensors' names begin.

    LLaVA, Bunny        model.vision_tower.vision_tower., model.mm_projector., model.image_newline
    Imp v1              transformer.vision_tower.vision_tower., transformer.mm_projector.
    transformers        vision_tower., multi_modal_projector., image_newline, language_model.   (files, and up to 4.51)
    from 4.52           model.vision_tower., model.multi_modal_projector., model.language_model., lm_head.

What begins with none of them is the language model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from models.weights.errors import WeightsError
from models.weights.families.registry import family_of
from models.weights.settings import Settings
from models.weights.view import Renamed, Tensors

Role = Literal["language", "tower", "projector", "newline"]
PREFIXES: tuple[tuple[str, Role, str], ...] = (  # (in the file, part, in the part); the first that fits counts
    ("model.vision_tower.vision_tower.", "tower", ""),
    ("transformer.vision_tower.vision_tower.", "tower", ""),
    ("model.vision_tower.", "tower", ""),
    ("vision_tower.", "tower", ""),
    ("model.mm_projector.", "projector", ""),
    ("transformer.mm_projector.", "projector", ""),
    ("model.multi_modal_projector.", "projector", ""),
    ("multi_modal_projector.", "projector", ""),
    ("model.image_newline", "newline", "image_newline"),
    ("image_newline", "newline", "image_newline"),
    ("model.language_model.", "language", "model."),
    ("language_model.", "language", ""),
    ("", "language", ""),
)


class PartView(Renamed):
    """One model's tensors under the names that they have when it stands alone. `prefixes`: how they begin there and
    here, for those that are not there."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str], prefixes: Sequence[tuple[str, str]]) -> None:
        super().__init__(tensors, names)
        self._prefixes = sorted(prefixes, key=lambda pair: -len(pair[1]))

    def there(self, text: str) -> str:
        """A name, or a text that begins with one, as in the file."""
        for there, here in self._prefixes:
            if text.startswith(here):
                return there + text.removeprefix(here)
        return text

    @contextmanager
    def errors_by_names_there(self) -> Iterator[None]:
        """What a WeightsError lists is named as in the file."""
        try:
            yield
        except WeightsError as error:
            for names in (error.missing, error.extra, error.mismatched):
                names[:] = map(self.there, names)
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Views of one set of files; a part that is not in them has no names."""

    language: PartView
    tower: PartView
    projector: PartView
    newline: PartView  # image_newline alone

    @property
    def vision_names(self) -> list[str]:
        """The file's names of what is not the language model's."""
        return [view.there(name) for view in (self.projector, self.newline, self.tower) for name in view.shapes]


def split(tensors: Tensors) -> Parts:
    """`tensors` by the models they belong to, under the names that these have when they stand alone.

    Raises:
        WeightsError: two tensors get one name: the file mixes layouts.
    """
    names: dict[Role, dict[str, str]] = {"language": {}, "tower": {}, "projector": {}, "newline": {}}
    prefixes: dict[Role, set[tuple[str, str]]] = {role: set() for role in names}
    for there in tensors.shapes:
        prefix, role, inner = next(place for place in PREFIXES if there.startswith(place[0]))
        here = inner + there.removeprefix(prefix)
        if here in names[role]:
            raise WeightsError(tensors.files[0].parent, f"{there} and {names[role][here]} are both the {role}'s {here}")
        names[role][here] = there
        prefixes[role].add((prefix, inner))
    return Parts(**{role: PartView(tensors, names[role], sorted(prefixes[role])) for role in names})


def text_settings(settings: Settings) -> Settings:
    """The part of a config.json that describes the language model: transformers nests it and leaves out what it has by
    default, a LLaMA of 7B; the others do not."""
    nested = settings.inner("text_config")
    if nested is None:
        return settings
    nested = nested.with_defaults({"model_type": "llama"})
    if settings.flag("tie_word_embeddings"):  # said of the whole, whatever the part says
        nested = Settings(nested.path, {**nested.values, "tie_word_embeddings": True})
    return nested.with_defaults(family_of(nested).defaults)
