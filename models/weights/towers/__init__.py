"""Vision towers in other projects' layouts: recognised by their contents, read under our names."""

from __future__ import annotations

from models.weights.source import VisionSource
from models.weights.towers.open import find_vision, open_tower_tensors, open_vision, unused_tensors

__all__ = ["VisionSource", "find_vision", "open_tower_tensors", "open_vision", "unused_tensors"]
