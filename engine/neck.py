"""The seam between tower and language model before anything trains: what checkpoints say of it, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from engine.config import Config
from engine.errors import UsageError
from engine.pictures import Pictures
from models.weights.checkpoint import Checkpoint, open_checkpoint
from models.weights.projector_files import FILES
from models.weights.vlm_settings import VLMSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Neck:
    """What is known of the seam."""

    projector: str = "auto"  # the kind; auto: nobody has said one
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of the projector; empty: it starts fresh
    image_newline: Tensor | None = None  # [D]
    source: Path = Path()  # where the tensors were read
    pictures: Pictures = field(default_factory=Pictures)  # how a VLM checkpoint was fed
    files: tuple[Path, ...] = ()  # those that are not the language model's


def with_start(config: Config, base: Checkpoint, path: Path | None) -> tuple[Checkpoint, Neck]:
    """`base` with the tower and the settings of what training starts from, where that has some, and the neck of both.

    Args:
        path: a projector, or a LoRA folder that has one; None: training starts from `base` alone.
    Raises:
        UsageError: --model.projector says another kind.
    """
    assert base.language is not None
    said = config.model.projector
    start = Checkpoint(kind="projector")
    if path is not None:
        start = open_checkpoint(path, base=base.language.config, projector="" if said == "auto" else said)
    whole = replace(base, vision=start.vision or base.vision, settings=start.settings or base.settings)
    neck = Neck(projector="auto" if whole.settings is None else whole.settings.projector or "auto")
    if start.projector and path is not None:
        files = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
        neck = Neck(
            projector=start.projector_kind, tensors=start.projector, image_newline=start.image_newline, source=path,
            files=tuple(files),
        )  # fmt: skip
    elif base.projector:
        source = base.language.files[0].parent
        neck = Neck(
            projector=base.projector_kind, tensors=base.projector, image_newline=base.image_newline, source=source
        )
    if "auto" not in (said, neck.projector) and said != neck.projector:
        raise UsageError(
            f"model.projector is {said}, and the weights or settings that are given are of kind {neck.projector}",
            where="--model.projector", why=f"read from {neck.source}" if neck.tensors else "", do="leave it out",
        )  # fmt: skip
    kind = said if neck.projector == "auto" else neck.projector
    return whole, replace(neck, projector=kind, pictures=pictures_of(whole.settings))


def pictures_of(settings: VLMSettings | None) -> Pictures:
    """How the pictures of a checkpoint with these settings were fed to it."""
    if settings is None:
        return Pictures()
    return Pictures(
        merge=settings.merge, aspect_ratio=settings.aspect_ratio, pinpoints=settings.grid_pinpoints,
        max_length=settings.max_length,
    )  # fmt: skip
