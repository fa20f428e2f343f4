"""Opens whatever a person calls "the checkpoint": the kind is read from its contents, never from its folder's name.

    language    a language model: params.json, or config.json and tensors
    vlm         the same with a projector, and often a tower, among its tensors: LLaVA, Bunny, Imp, transformers
    lora        adapter_config.json, adapter_model.*, and non_lora_trainables.bin with the projector; no language model
    projector   mm_projector.bin alone, or with the config.json of its training beside it

Nothing is opened half: every tensor is a part of what is returned, or in an error that lists it. (A mm_projector.bin
beside a whole model is not read: LLaVA's repositories hold the projector twice.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.language.config import DecoderConfig
from models.weights.errors import WeightsError
from models.weights.families.registry import family_of
from models.weights.hf_files import has_tensors
from models.weights.language import open_language, open_parts
from models.weights.lora_files import read_peft
from models.weights.lora_settings import CONFIG_NAME
from models.weights.meta import is_meta
from models.weights.names import check_shapes
from models.weights.prequantized import Prequantized, dense
from models.weights.projector_files import FILES, ProjectorFile, check_projector, read_projector
from models.weights.projector_names import our_projector_name, projector_kind
from models.weights.settings import Settings, read_settings
from models.weights.source import LanguageSource, VisionSource
from models.weights.split import Parts, PartView, text_settings
from models.weights.towers import open_tower_tensors
from models.weights.vlm_settings import VLMSettings, is_vlm, vlm_settings

Kind = Literal["language", "vlm", "projector", "lora"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds. Parts that it does not hold are None; no weight of a language model or a tower has been read
    yet, projectors and LoRA (small) are in memory."""

    kind: Kind
    language: LanguageSource | None = None
    vision: VisionSource | None = None  # the tower, where its weights are in the checkpoint
    projector: Mapping[str, Tensor] | None = None  # our names (models/projector.py), file's dtype
    projector_kind: str = ""  # where there is one: mlp2x_gelu
    image_newline: Tensor | None = None  # [D]
    lora: Mapping[str, Tensor] | None = None  # our names within the language model: layers.0.attention.q.lora.a
    lora_config: LoRAConfig | None = None
    settings: VLMSettings | None = None


def open_checkpoint(path: str | Path, *, base: DecoderConfig | None = None, projector: str = "") -> Checkpoint:
    """The parts of the checkpoint in `path`, a folder or a projector's file. Where the folder has no config.json that
    says it, `base` is the language model that a LoRA is for, and `projector` the kind of a projector whose tensors may
    be of several.

    Raises:
        WeightsError: nothing that is known lies there, or a file is wrong; nothing is opened half.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(path, "is not there", do="name a folder with a checkpoint, or a projector's file")
    if path.is_file():
        return _projector(read_projector(path, projector), None)
    config = path / "config.json"
    settings = read_settings(config) if config.exists() else None
    if is_meta(path):
        return Checkpoint(kind="language", language=open_language(path))
    if (path / CONFIG_NAME).exists():
        return _lora(path, settings, base, projector)
    if settings is not None and has_tensors(path):
        return _whole(path, settings, projector)
    if any((path / name).exists() for name in FILES):
        return _projector(read_projector(path, _said(settings, projector)), settings)
    raise WeightsError(
        path, "is no checkpoint: it holds no config.json with tensors, no params.json, no adapter_config.json and none "
        f"of {', '.join(FILES)}", do="name the folder itself; download the weights, not only the configuration",
    )  # fmt: skip


def _said(settings: Settings | None, projector: str) -> str:
    """The projector's kind as a config.json says it, `projector` where none does."""
    return (settings.text("mm_projector_type") if settings is not None else "") or projector


def _whole(folder: Path, settings: Settings, named: str) -> Checkpoint:
    language, parts = open_parts(folder, settings)
    if not is_vlm(settings):
        if parts.vision_names:
            raise WeightsError(
                settings.path, "says nothing of a tower (mm_vision_tower, vision_config), but the tensors do",
                extra=parts.vision_names, do="put the config.json that belongs to the tensors beside them",
            )  # fmt: skip
        return Checkpoint(kind="language", language=language)
    projector = Prequantized(parts.projector)
    with _named(folder):
        said = vlm_settings(settings, projector_kind(projector.shapes, _said(settings, named)))
    vision = _tower(folder, parts.tower, settings, said)
    theirs = {leaf: parts.projector.there(leaf) for leaf in projector.shapes}
    check_projector(
        folder, {theirs[leaf]: shape for leaf, shape in projector.shapes.items()}, theirs, said.projector,
        takes=None if vision is None else vision.config.feature_width, gives=language.config.dim,
    )  # fmt: skip
    return Checkpoint(
        kind="vlm", language=language, vision=vision, projector=_in_memory(projector, said.projector),
        projector_kind=said.projector, image_newline=_newline(folder, parts, said, language.config.dim), settings=said,
    )  # fmt: skip


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """A ValueError becomes a WeightsError that names the folder."""
    try:
        yield
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(folder, str(error)) from error


def _tower(folder: Path, tensors: PartView, settings: Settings, said: VLMSettings) -> VisionSource | None:
    """The tower among a checkpoint's tensors; None where it is its author's, unchanged, and lies elsewhere."""
    if not tensors.shapes and said.tower_trained:
        raise WeightsError(
            folder, "is said to hold its vision tower (config.json: unfreeze_mm_vision_tower, unfreeze_vision_tower or "
            "vision_config), and none is among its tensors", do="get all files of the model",
        )  # fmt: skip
    return _opened(folder, tensors, settings, said) if tensors.shapes else None


def _opened(where: Path, tensors: PartView, settings: Settings | None, said: VLMSettings | None) -> VisionSource:
    """A tower, with what its checkpoint's settings take of it."""
    described = None if settings is None else settings.inner("vision_config")
    layer, feature = (None, None) if said is None else (said.select_layer, said.select_feature)
    with tensors.errors_by_names_there():
        source = open_tower_tensors(where, tensors, described, select_layer=layer, select_feature=feature)
    with _named(where):
        return replace(source, config=replace(source.config, scales=() if said is None else said.scales))


def _in_memory(weights: Prequantized, kind: str) -> dict[str, Tensor]:
    try:
        return {our_projector_name(name, kind): dense(weights.fetch(name)).clone() for name in weights.shapes}
    finally:
        weights.close()


def _newline(folder: Path, parts: Parts, said: VLMSettings, dim: int) -> Tensor | None:
    """image_newline [D], which tiles that are put together as spatial_unpad need."""
    wanted = dict.fromkeys(parts.newline.shapes or (["image_newline"] if said.merge == "spatial_unpad" else []), (dim,))
    check_shapes(folder, parts.newline.shapes, wanted, do="get all files of the model")
    return parts.newline.fetch("image_newline").clone() if wanted else None


def _projector(file: ProjectorFile, settings: Settings | None) -> Checkpoint:
    said = None if settings is None or not is_vlm(settings) else vlm_settings(settings, file.kind)
    return Checkpoint(kind="projector", **_beside(file, settings, said))


def _lora(folder: Path, settings: Settings | None, base: DecoderConfig | None, named: str) -> Checkpoint:
    if has_tensors(folder):
        raise WeightsError(
            folder, f"holds a LoRA ({CONFIG_NAME}) and a whole model too",
            do="move one of them into a folder of its own, and name the one that is meant",
        )  # fmt: skip
    if base is None and settings is not None:
        language = text_settings(settings)
        base = family_of(language).config_of(language)
    if base is None:
        raise WeightsError(folder, "has LoRA adapters and no config.json that says of which model",
                           do="name the language model too, or copy its config.json into the folder")  # fmt: skip
    tensors, lora = read_peft(folder, base)
    beside = next((folder / name for name in reversed(FILES) if (folder / name).exists()), None)
    file = None if beside is None else read_projector(beside, _said(settings, named))
    said = None
    if settings is not None and is_vlm(settings):
        said = vlm_settings(settings, "" if file is None else file.kind)
    parts = {"settings": said} if file is None else _beside(file, settings, said)
    return Checkpoint(kind="lora", lora=tensors, lora_config=lora, **parts)


def _beside(file: ProjectorFile, settings: Settings | None, said: VLMSettings | None) -> dict[str, Any]:
    """What stands in a file beside a language model: fields of a Checkpoint."""
    vision = None if file.tower is None else _opened(file.path, file.tower, settings, said)
    return {
        "vision": vision, "projector": file.tensors, "projector_kind": file.kind,
        "image_newline": file.image_newline, "settings": said,
    }  # fmt: skip
