"""Every family of language models, and which of them a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable

from models.weights.errors import WeightsError
from models.weights.families import llama, phi, phi3, stablelm
from models.weights.families.family import Family
from models.weights.settings import Settings

FAMILIES = (phi.FAMILY, phi3.FAMILY, stablelm.FAMILY, llama.FAMILY)  # those with more marks before those with fewer


def family_of(settings: Settings, names: Iterable[str] = ()) -> Family:
    """The family that the tensors' `names` show, for a config.json may say llava of anything; where they show none, or
    there are none, the one of its model_type.

    Raises:
        WeightsError: a model_type that is not known, or neither says anything.
    """
    said, held = settings.text("model_type"), set(names)
    by_type = next((family for family in FAMILIES if said in family.model_types), None)
    if said and by_type is None:
        known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
        raise WeightsError(settings.path, f"model_type is {said!r}; supported are {known}")
    family = next((family for family in FAMILIES if family.layout_in(held) is not None), by_type)
    if family is None:
        raise WeightsError(settings.path, "says no model_type, and the tensors' names are of no known language model")
    return family


def family_named(name: str) -> Family:
    """The family that DecoderConfig.family names."""
    return next(family for family in FAMILIES if family.name == name)
