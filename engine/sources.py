"""Where a run's base comes from: files of the language model, of the tower, of the projector, and the tokenizer.

Whatever names them (a folder, a file, a Hub id, a whole vision-language checkpoint), opening reads no weight of a
language model or tower; a projector is small and is in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from engine.config import Config
from engine.data.tokenizer import Tokenizer, open_tokenizer
from engine.demo.cache import demo_base
from engine.errors import CheckpointError, UsageError
from engine.image_choices import ImageChoices, choose_images
from engine.projector_source import ProjectorSource, with_start
from engine.tower_choice import named_tower, with_choices
from kernels.nf4 import NF4Tensor
from models.weights.checkpoint import Checkpoint, open_checkpoint
from models.weights.errors import WeightsError
from models.weights.hub import find_cached, resolve
from models.weights.language import LanguageSource, open_language
from models.weights.projector_files import FILES
from models.weights.towers import VisionSource, find_vision, open_vision

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Sources:
    """The base of a run."""

    language: LanguageSource
    vision: VisionSource
    tokenizer: Tokenizer
    images: ImageChoices  # its tower is `vision`'s
    projector: ProjectorSource = field(default_factory=ProjectorSource)

    @property
    def files(self) -> list[Path]:
        """Every weight file, for the identity that checkpoints record."""
        return list(dict.fromkeys((*self.language.files, *self.vision.files, *self.projector.files)))


def open_sources(config: Config) -> Sources:
    """Finds and opens (without reading weights) everything that `config.model` names; the embedded demo's base when it
    names nothing.

    Raises:
        CheckpointError: a file is missing or of another kind.
        DataError: tokenizer and language model do not belong together.
        UsageError: flags and checkpoint contradict each other.
        WeightsError: a file is wrong.
    """
    folder, path = base_paths(config)
    folder = located(folder, "--model.language")
    if not folder.is_dir():
        raise CheckpointError(
            f"no folder with the language model's weights at {folder}", where="--model.language",
            do="name the folder that holds params.json or config.json (LaVIN: --llama_model_path and --llm_model)",
        )  # fmt: skip
    checkpoint = open_base(config, folder)
    language = checkpoint.language
    assert language is not None
    if (folder / "config.json").is_file():  # Meta's files are never quantized
        _check_bits(config, language, folder)
    checkpoint, projector = with_start(config, checkpoint, language.config, _start(config))
    vision, images = _tower(config, checkpoint, projector.kind, path)
    tokenizer = open_tokenizer(config.model.tokenizer or folder)
    tokenizer.require_vocab(language.config.vocab_size, str(folder))
    return Sources(language=language, vision=vision, tokenizer=tokenizer, images=images, projector=projector)


def base_paths(config: Config) -> tuple[Path, Path | None]:
    """The folder of the language model (there or not) and the tower, None where none is found. Without any name both
    are the embedded demo's."""
    if not config.model.language:
        folder = demo_base()
        return folder, Path(config.model.vision) if config.model.vision else folder / "tower"
    folder = Path(config.model.language)
    named = Path(config.model.vision) if config.model.vision else None
    return folder, named or find_vision(folder, folder.parent)


def located(path: Path, where: str = "") -> Path:
    """`path`, or the local folder of the Hub repository that it names. Where there is a folder weights/, the Hub is not
    asked for weights/7B, unless as weights/7B@main.

    Args:
        where: what named it, for the error.
    Raises:
        CheckpointError: it looks like a Hub id and is none that can be had.
    """
    if path.exists() or not HUB_ID.fullmatch(str(path)):
        return path
    if path.parent.is_dir() and "@" not in path.name and find_cached(str(path)) is None:
        raise CheckpointError(
            f"{path} is not there", where=where, why=f"{path.parent.resolve()} holds {_names_in(path.parent)}",
            do=f"name what is there; {path}@main means the Hub's, whatever folders are here",
        )  # fmt: skip
    try:
        return resolve(str(path))
    except WeightsError as error:
        raise CheckpointError(
            f"{path} is not there", where=where, why=f"as a name on the Hugging Face hub it {error.what}",
            do=error.do or "name a folder that is there",
        ) from error  # fmt: skip


def _names_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def open_base(config: Config, folder: Path) -> Checkpoint:
    """What the language model's folder holds; with a delta, the language model alone.

    Raises:
        CheckpointError: it holds no language model.
    """
    if config.model.delta:
        language = open_language(folder, config.model.delta, legacy_permutation=config.legacy.vicuna_permutation)
        return Checkpoint(kind="language", language=language)
    checkpoint = Checkpoint(kind="lora") if is_lora_folder(folder) else open_checkpoint(folder)
    if checkpoint.language is None:
        flag = "--adapter.init" if checkpoint.kind == "lora" else "--model.projector_weights"
        raise CheckpointError(
            f"{folder} holds a {checkpoint.kind}, and no language model", where="--model.language",
            do=f"name the language model that it was trained on, and this folder as {flag}",
        )  # fmt: skip
    return checkpoint


def _check_bits(config: Config, language: LanguageSource, folder: Path) -> None:
    """Weights that are quantized in their files stay as they are."""
    name = "layers.0.attention.o.weight"
    weight = language.fetch(name)
    held = "" if isinstance(weight, Tensor) else "4bit" if isinstance(weight, NF4Tensor) else "8bit"
    del weight
    language.release(name)
    if held and config.train.language == "full":
        raise UsageError(
            f"train.language full with weights of {held} in {folder}", where="--train.language and --model.language",
            why="quantized weights cannot be trained",
            do=f"--train.language lora (or mma) --bits {held}, or name the model in 16 bits",
        )  # fmt: skip
    if held and config.bits != held:
        raise UsageError(
            f"bits is {config.bits}, and the weights in {folder} are quantized to {held}", where="--bits",
            why="what quantizing lost does not come back", do=f"--bits {held}, or name the model in 16 bits",
        )  # fmt: skip


def _start(config: Config) -> Path | None:
    path = start_path(config)
    return located(path, "--model.projector_weights") if path is not None and config.model.projector_weights else path


def start_path(config: Config) -> Path | None:
    """Where a projector, and perhaps more, is that training starts from: --model.projector_weights as it was typed,
    else what stands beside the LoRA of --adapter.init."""
    if config.model.projector_weights:
        return Path(config.model.projector_weights)
    folder = lora_start(config)
    if folder is None or config.train.vision != "lora":
        return folder
    return next((folder / name for name in FILES if (folder / name).is_file()), None)  # the tower's LoRA is read later


def lora_start(config: Config) -> Path | None:
    """The LoRA folder that --adapter.init names; None where it names none."""
    folder = Path(config.adapter.init)  # of an empty name the current directory
    return folder if config.adapter.init and is_lora_folder(folder) else None


def is_lora_folder(folder: Path) -> bool:
    """Whether this is a LoRA as PEFT and LLaVA write it."""
    return (folder / "adapter_config.json").is_file()


def _tower(
    config: Config, checkpoint: Checkpoint, projector: str, path: Path | None
) -> tuple[VisionSource, ImageChoices]:
    """The tower with what is taken of it: the one that is named, else the one in the checkpoint, else the one that its
    settings name, else what is found (`path`)."""
    settings = checkpoint.settings
    if checkpoint.vision is not None and not config.model.vision:
        images = choose_images(config, checkpoint.vision.config, settings, projector, held=True)
        return replace(checkpoint.vision, config=images.tower), images
    path, where = named_tower(config, settings, path)
    if path is None:
        raise CheckpointError(
            "no CLIP vision tower found", where="the language model's folder, the folder above it, ~/.cache/clip and "
            "the Hugging Face cache",
            do="pass --model.vision with OpenAI's ViT-L-14.pt or a folder, file or Hub id of a tower",
        )  # fmt: skip
    path = located(path, where)
    if not path.exists():
        raise CheckpointError(
            f"no vision tower at {path}", where=where,
            do="pass --model.vision with a folder, file or Hub id of a CLIP, SigLIP or EVA02-CLIP tower",
        )  # fmt: skip
    tower = open_vision(path)
    images = choose_images(config, tower.config, settings, projector)
    return with_choices(tower, path, images.tower), images
