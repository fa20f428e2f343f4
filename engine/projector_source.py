"""The projector between tower and language model before anything trains: its kind, and the weights that files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from engine.config import Config
from engine.errors import UsageError
from models.language.config import DecoderConfig
from models.weights.checkpoint import Checkpoint, open_checkpoint
from models.weights.projector_files import FILES


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSource:
    """What is known of the projector, and of image_newline, which is trained with it."""

    kind: str = "auto"  # auto: nobody has said one
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # our names; empty: it starts fresh
    image_newline: Tensor | None = None  # [D]
    path: Path = Path()  # where the tensors were read
    files: tuple[Path, ...] = ()  # those that are not the language model's


def with_start(
    config: Config, base: Checkpoint, language: DecoderConfig, path: Path | None
) -> tuple[Checkpoint, ProjectorSource]:
    """`base` with the tower and the settings of what training starts from, where that has some, and the projector of
    both.

    Args:
        language: the language model of `base`, whose own weights may not be here.
        path: a projector, or a LoRA folder that has one; None: training starts from `base` alone.
    Raises:
        UsageError: --model.projector says another kind.
    """
    flag = config.model.projector
    start = Checkpoint(kind="projector")
    if path is not None:
        start = open_checkpoint(path, base=language, projector="" if flag == "auto" else flag)
    whole = replace(base, vision=start.vision or base.vision, settings=start.settings or base.settings)
    source = ProjectorSource(kind="auto" if whole.settings is None else whole.settings.projector or "auto")
    if start.projector and path is not None:
        files = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
        source = ProjectorSource(
            kind=start.projector_kind, tensors=start.projector, image_newline=start.image_newline, path=path,
            files=tuple(files),
        )  # fmt: skip
    elif base.projector and base.language is not None:
        source = ProjectorSource(
            kind=base.projector_kind, tensors=base.projector, image_newline=base.image_newline,
            path=base.language.files[0].parent,
        )  # fmt: skip
    if "auto" not in (flag, source.kind) and flag != source.kind:
        raise UsageError(
            f"model.projector is {flag}, and the weights or settings that are given are of kind {source.kind}",
            where="--model.projector", why=f"read from {source.path}" if source.tensors else "", do="leave it out",
        )  # fmt: skip
    return whole, source if flag == "auto" else replace(source, kind=flag)
