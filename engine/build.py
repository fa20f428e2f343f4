"""From a configuration to a model that is ready to train: where weights come from, what is built, how it is filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import find_latest, load_checkpoint
from engine.config import BITS, Config, dataset_format, longest_sample
from engine.data.chat import ChatData
from engine.data.layout import Layout
from engine.data.rows import Rows
from engine.data.sample import Dataset
from engine.data.scienceqa import ScienceQA
from engine.data.tokenizer import Tokenizer
from engine.demo.cache import demo_base, demo_data
from engine.errors import CheckpointError
from engine.loading.cache import cache_of
from engine.loading.load import Loading
from models.adapters.mma import AdapterConfig
from models.language.llama import LLAMA_13B, LlamaConfig
from models.placement import Bits
from models.vision.clip import NUM_TAPS, ClipConfig
from models.vlm import Legacy, VisionLanguageModel, VLMConfig
from models.weights.clip import VisionSource, find_vision, open_vision
from models.weights.identity import check_identity
from models.weights.language import LanguageSource, open_language
from models.weights.lavin import read_lavin_adapters, read_lavin_args
from models.weights.names import check_shapes


@dataclass(frozen=True, slots=True)
class Sources:
    """The base of a run: files of the language model, of the tower, and the tokenizer."""

    language: LanguageSource
    vision: VisionSource
    tokenizer: Tokenizer

    @property
    def files(self) -> list[Path]:
        """Every weight file, for the identity that checkpoints record."""
        return [*self.language.files, *self.vision.files]


def open_sources(config: Config) -> Sources:
    """Finds and opens (without reading weights) everything that `config.model` names; the embedded demo's base when it
    names nothing.

    Raises:
        CheckpointError: a file is missing or of another kind.
        DataError: tokenizer and language model do not belong together.
    """
    folder, path = base_paths(config)
    if not folder.is_dir():
        raise CheckpointError(
            f"no folder with the language model's weights at {folder}", where="--model.language",
            do="name the folder that holds params.json or config.json (LaVIN: --llama_model_path and --llm_model)",
        )  # fmt: skip
    if path is None:
        raise CheckpointError(
            "no CLIP vision tower found", where=f"{folder}, {folder.parent}, ~/.cache/clip and the Hugging Face cache",
            do="pass --model.vision with OpenAI's ViT-L-14.pt or a Hugging Face folder",
        )  # fmt: skip
    language = open_language(folder, config.model.delta, legacy_permutation=config.legacy.vicuna_permutation)
    tokenizer = Tokenizer(_tokenizer_path(config.model.tokenizer, folder))
    tokenizer.require_vocab(language.config.vocab_size, str(folder))
    return Sources(language=language, vision=open_vision(path), tokenizer=tokenizer)


def base_paths(config: Config) -> tuple[Path, Path | None]:
    """The folder of the language model (there or not) and the tower, None where none is found. Without any name both
    are the embedded demo's."""
    if not config.model.language:
        folder = demo_base()
        return folder, Path(config.model.vision) if config.model.vision else folder / "tower"
    folder = Path(config.model.language)
    named = Path(config.model.vision) if config.model.vision else None
    return folder, named or find_vision(folder, folder.parent)


def _tokenizer_path(named: str, folder: Path) -> Path:
    candidates = [Path(named)] if named else [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    for path in candidates:
        if path.is_file():
            return path
    raise CheckpointError(
        "no tokenizer found", where=", ".join(map(str, candidates)), do="pass tokenizer.model as --model.tokenizer"
    )


def vlm_config(config: Config, language: LlamaConfig, vision: ClipConfig) -> VLMConfig:
    """The model that this configuration describes."""
    return VLMConfig(
        language=language,
        vision=vision,
        adapter=AdapterConfig(
            dim=config.adapter.dim, scale=config.adapter.scale,
            temperature=router_temperature(config, language), dropout=config.adapter.dropout,
        ),
        projector_hidden=config.model.projector_hidden,
        language_placement=config.adapter.language,
        vision_placement=config.adapter.vision,
        train_language=config.train.language,
        train_vision=config.train.vision,
        train_projector=config.train.projector,
        drop_path=config.model.drop_path,
        legacy=Legacy(
            clip_router=config.legacy.clip_router,
            normal_adapter=config.legacy.normal_adapter,
            block_routing=config.legacy.block_routing,
        ),
    )  # fmt: skip


def router_temperature(config: Config, language: LlamaConfig) -> float:
    """The flag where it is given, else what LaVIN's adapter file says it was trained with, else LaVIN's choice for a
    model of this size. It is in none of the tensors."""
    if config.adapter.temperature is not None:
        return config.adapter.temperature
    file = Path(config.adapter.init)
    said = read_lavin_args(file).get("temperature") if config.adapter.init and file.is_file() else None
    if isinstance(said, int | float):
        return float(said)
    return 5.0 if language.dim >= LLAMA_13B.dim else 10.0


def build_model(
    config: Config, sources: Sources, *, device: torch.device, dtype: torch.dtype, is_main: bool = True,
) -> VisionLanguageModel:  # fmt: skip
    """Builds on the meta device, then fills tensor by tensor: frozen weights from their files or, where an earlier
    start has quantized them, from the cache; what trains fresh. The main rank shows how it goes and writes the cache.
    """
    cache = cache_of(config, sources.files, len(sources.language.files), dtype)
    loading = Loading(bits_of(config), device, dtype, cache, is_main)
    try:
        model = None if cache is None else loading.from_cache(_empty(config, sources, device))
        if model is None:
            model = loading.from_sources(_empty(config, sources, device), sources.language, sources.vision)
        return model
    finally:
        sources.language.close()
        sources.vision.close()


def bits_of(config: Config) -> dict[str, Bits]:
    """In how many bits each part of the model stores its linears' weights, by their names within the part."""
    layers, head, vision = (BITS[b] for b in (config.bits, config.bits_head, config.bits_vision))
    return {"language": lambda name: head if name == "head.weight" else layers, "vision": lambda name: vision}


def _empty(config: Config, sources: Sources, device: torch.device) -> VisionLanguageModel:
    """The model with what trains on `device`, what is frozen on the meta device."""
    with torch.device("meta"):
        model = VisionLanguageModel(vlm_config(config, sources.language.config, sources.vision.config))
    model.start_trainable(config.seed, device)
    return model


def layout_of(config: Config, tokenizer: Tokenizer) -> Layout:
    """How this configuration lays out text."""
    return Layout(tokenizer, max_seq_len=longest_sample(config), image_tokens=NUM_TAPS)


def open_scienceqa(config: Config, tokenizer: Tokenizer, split: str) -> ScienceQA:
    """A split of ScienceQA, or of the embedded demo when no root is named."""
    root = config.dataset.root or demo_data()
    return ScienceQA(
        root, split, layout_of(config, tokenizer), prompt_format=config.dataset.prompt_format,
        options=config.dataset.options, use_caption=config.dataset.use_caption, captions=config.dataset.captions,
    )  # fmt: skip


def open_dataset(config: Config, tokenizer: Tokenizer) -> Dataset:
    """What this run trains on."""
    kind = dataset_format(config)
    if kind == "rows":
        return Rows(config.data, config.image_folder, layout_of(config, tokenizer))
    if kind == "chat":
        root = Path(config.dataset.root)
        return ChatData(root / "all_data.json", root, layout_of(config, tokenizer))
    return open_scienceqa(config, tokenizer, config.dataset.split)


def load_trained(model: VisionLanguageModel, path: Path, base: Sequence[Path]) -> str:
    """Puts trained tensors into the model: a run directory, one of its step directories, or LaVIN's adapter file.
    `base` are the files that the frozen weights came from: a run knows on which ones it was trained. Returns what was
    read.

    Raises:
        CheckpointError: nothing whole is there.
        WeightsError: its tensors are not those that train under this configuration (all listed).
    """
    trainable = model.trainable()
    if path.is_dir():
        step = path if path.name.startswith("step-") else best_or_latest(path)
        if step is None:
            raise CheckpointError(f"{path} has no checkpoint", do="name a run directory that was trained")
        tensors, state = load_checkpoint(step, only=["model"])
        check_identity(state["base"], base)
        path = step
    else:
        tensors = read_lavin_adapters(path, {name: tuple(p.shape) for name, p in trainable.items()})
    put_back(trainable, tensors, path)
    return str(path)


@torch.no_grad()
def put_back(trainable: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copies the tensors of `file` into the parameters of the same names.

    Raises:
        WeightsError: names or shapes are not those that train under this configuration (all listed).
    """
    found, expected = ({name: tuple(t.shape) for name, t in these.items()} for these in (tensors, trainable))
    check_shapes(file, found, expected, do="use the configuration of the run that wrote it (its config.yaml)")
    for name, parameter in trainable.items():
        parameter.copy_(tensors[name])


def best_or_latest(run: Path) -> Path | None:
    """The checkpoint with the best validation loss where a run kept one, else its newest whole one."""
    hint = run / "best"
    if hint.is_file() and (best := run / hint.read_text(encoding="utf-8").strip()).is_dir():
        return best
    return find_latest(run)
