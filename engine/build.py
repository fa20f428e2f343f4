"""From a configuration and its opened sources to a model that is ready to train, and to the data that it reads."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.architecture import model_of
from engine.config import BITS, Config, dataset_format, longest_sample
from engine.data.chat import ChatData
from engine.data.layout import Layout
from engine.data.rows import Rows
from engine.data.sample import Dataset
from engine.data.scienceqa import ScienceQA
from engine.data.tokenizer import Tokenizer
from engine.demo.cache import demo_data
from engine.loading.cache import cache_of
from engine.loading.load import Loading
from engine.pictures import anyres_of
from engine.sources import Sources
from engine.starting import put_projector
from models.placement import Bits
from models.vlm import VisionLanguageModel, VLMConfig


def build_model(
    config: Config, sources: Sources, *, device: torch.device, dtype: torch.dtype, is_main: bool = True,
) -> VisionLanguageModel:  # fmt: skip
    """Builds on the meta device, then fills tensor by tensor: frozen weights from their files or, where an earlier
    start has quantized them, from the cache; what trains fresh, but for a projector that has weights. The main rank
    shows how it goes and writes the cache.
    """
    cache = cache_of(config, sources.language, sources.vision, dtype)
    loading = Loading(bits_of(config), device, dtype, cache, is_main)
    try:
        model = None if cache is None else loading.from_cache(_empty(config, sources, device))
        if model is None:
            model = loading.from_sources(_empty(config, sources, device), sources.language, sources.vision)
    finally:
        sources.language.close()
        sources.vision.close()
    put_projector(model, sources.projector)
    return model


def bits_of(config: Config) -> dict[str, Bits]:
    """In how many bits each part of the model stores its linears' weights, by their names within the part."""
    layers, head, vision = (BITS[b] for b in (config.bits, config.bits_head, config.bits_vision))
    return {"language": lambda name: head if name == "head.weight" else layers, "vision": lambda name: vision}


def _empty(config: Config, sources: Sources, device: torch.device) -> VisionLanguageModel:
    """The model with what trains on `device`, what is frozen on the meta device."""
    with torch.device("meta"):
        model = VisionLanguageModel(model_of(config, sources))
    model.start_trainable(config.seed, device)
    return model


def layout_of(config: Config, tokenizer: Tokenizer, shape: VLMConfig) -> Layout:
    """How this configuration lays out text for a model of this shape."""
    return Layout(
        tokenizer, max_seq_len=longest_sample(config), modality=shape.has_modality_token,
        image_tokens=anyres_of(config, shape) or shape.tokens_per_tile,
    )  # fmt: skip


def open_scienceqa(config: Config, tokenizer: Tokenizer, split: str, shape: VLMConfig) -> ScienceQA:
    """A split of ScienceQA, or of the embedded demo when no root is named."""
    root = config.dataset.root or demo_data()
    return ScienceQA(
        root, split, layout_of(config, tokenizer, shape), prompt_format=config.dataset.prompt_format,
        options=config.dataset.options, use_caption=config.dataset.use_caption, captions=config.dataset.captions,
    )  # fmt: skip


def open_dataset(config: Config, tokenizer: Tokenizer, shape: VLMConfig) -> Dataset:
    """What this run trains on."""
    kind = dataset_format(config)
    if kind == "rows":
        return Rows(config.data, config.image_folder, layout_of(config, tokenizer, shape))
    if kind == "chat":
        root = Path(config.dataset.root)
        return ChatData(root / "all_data.json", root, layout_of(config, tokenizer, shape))
    return open_scienceqa(config, tokenizer, config.dataset.split, shape)
