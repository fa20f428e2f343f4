"""Fills a model with its frozen weights: from the source files, or from what an earlier start made of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from engine.loading.cache import CacheDamaged, CachedWeights, CacheUnreadable, WeightCache
from engine.loading.cache_writer import start_writing
from engine.loading.progress import LoadProgress
from models.placement import Bits, fill
from models.vlm import VisionLanguageModel
from models.weights.errors import WeightsError
from models.weights.language import LanguageSource
from models.weights.towers import VisionSource

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Loading:
    """How the weights of one configuration are loaded on one rank."""

    bits: Mapping[str, Bits]  # of each part of the model: language, vision
    device: torch.device
    dtype: torch.dtype
    cache: WeightCache | None
    is_main: bool  # shows how it goes, says what is wrong with the cache, and writes it

    def from_cache(self, model: VisionLanguageModel) -> VisionLanguageModel | None:
        """The model as it was stored; None where no cache is there, where it cannot be read, or where it is damaged,
        which then is gone."""
        assert self.cache is not None
        try:
            found = self.cache.open()
            if found is None:
                return None
            self._read(found, model)
            if self.is_main:
                self._say(f"quantized weights come from {self.cache.folder}")
            return model
        except (CacheDamaged, WeightsError) as error:
            if self.is_main:
                self.cache.drop(str(error))
            return None
        except CacheUnreadable as error:
            if self.is_main:
                logger.warning("the cache of quantized weights is not used, for it cannot be read: %s", error)
            return None

    def from_sources(
        self, model: VisionLanguageModel, language: LanguageSource, vision: VisionSource
    ) -> VisionLanguageModel:
        """The model from its source files, tensor by tensor."""
        parts = _parts(model)
        with ExitStack() as stack:
            writer = start_writing(self.cache, parts, self.bits, self.dtype) if self.cache and self.is_main else None
            if writer is not None:
                stack.callback(writer.abort)
            sources: dict[str, LanguageSource | VisionSource] = {"language": language, "vision": vision}
            total = sum(sum(source.sizes.values()) for source in sources.values())
            quantizes = any(self.bits[part](name) < 16 for part, source in sources.items() for name in source.names)
            doing = "reading and quantizing weights" if quantizes else "reading weights"
            progress = stack.enter_context(LoadProgress(total, doing, self.is_main))
            for part, source in sources.items():

                def on_tensor(name: str, part: str = part, sizes: Mapping[str, int] = source.sizes) -> None:
                    if writer is not None:
                        writer.add(part, name)
                    progress.advance(sizes[name])

                fill(
                    parts[part], source.stream(), bits=self.bits[part], device=self.device, dtype=self.dtype,
                    source=str(source.files[0].parent), on_tensor=on_tensor,
                )  # fmt: skip
            kept = writer.commit() if writer is not None else None
        if kept is not None:
            self._say(f"quantized weights are kept for the next start: {kept}")
        return model

    def _read(self, found: CachedWeights, model: VisionLanguageModel) -> None:
        sizes = found.sizes()
        with LoadProgress(sum(sizes.values()), "reading the cache of quantized weights", self.is_main) as progress:
            for part, module in _parts(model).items():
                fill(
                    module, found.stream(part), bits=self.bits[part], device=self.device, dtype=self.dtype,
                    source=str(found.archive.path),
                    on_tensor=lambda name, part=part: progress.advance(sizes[f"{part}.{name}"]),  # type: ignore[misc]
                )  # fmt: skip

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        logger.info("%s", text)


def _parts(model: VisionLanguageModel) -> dict[str, nn.Module]:
    return {"language": model.language, "vision": model.vision}
