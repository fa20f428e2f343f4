"""A tower's configuration from the numbers of its file and a person's choice of layer and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from models.vision.tower import SelectFeature, TowerConfig
from models.weights.errors import WeightsError

ConfigT = TypeVar("ConfigT", bound=TowerConfig)


def selection(select_layer: int | None, select_feature: SelectFeature | None) -> dict[str, Any]:
    """The fields that say which tokens are taken. None: the family's own; a layer alone means that layer's patches."""
    if select_layer is not None and select_feature is None:
        select_feature = "patch"
    chosen = {"select_layer": select_layer, "select_feature": select_feature}
    return {key: value for key, value in chosen.items() if value is not None}


def make_config(kind: type[ConfigT], where: Path, fields: Mapping[str, Any]) -> ConfigT:
    """The tower that `where` describes; a WeightsError where its numbers make none."""
    if fields["num_heads"] < 1:
        raise WeightsError(where, f"a width of {fields['width']} is less than a head's")
    try:
        return kind(**fields)
    except ValueError as error:
        raise WeightsError(where, str(error)) from error
