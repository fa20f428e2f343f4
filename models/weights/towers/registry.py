"""Every family of towers."""

from __future__ import annotations

from models.weights.errors import WeightsError
from models.weights.settings import Settings
from models.weights.towers import clip, eva, siglip
from models.weights.towers.family import Family

FAMILIES = (clip.FAMILY, siglip.FAMILY, eva.FAMILY)


def family_named(name: str) -> Family:
    """The family that TowerConfig.family names."""
    return next(family for family in FAMILIES if family.name == name)


def family_described(settings: Settings) -> Family:
    """The family of a vision_config; CLIP where it says nothing, as transformers has it.

    Raises:
        WeightsError: a model_type that is not known.
    """
    said = settings.text("model_type")
    by_type = {name: family for family in FAMILIES if family.in_transformers is not None
               for name in family.in_transformers.model_types}  # fmt: skip
    if not said or said in by_type:
        return by_type.get(said, clip.FAMILY)
    known = ", ".join(by_type)
    raise WeightsError(settings.path, f"vision_config has the model_type {said!r}; supported are {known}")
