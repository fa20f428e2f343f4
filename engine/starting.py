"""Weights that training starts from, or has left: a run of ours, LaVIN's adapter file, a LoRA folder, a projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import find_latest, load_checkpoint
from engine.errors import CheckpointError, UsageError
from engine.projector_source import ProjectorSource
from engine.sources import is_lora_folder
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.identity import check_identity
from models.weights.lavin import read_lavin_adapters
from models.weights.lora_files import read_peft, read_peft_tower
from models.weights.names import check_shapes

OF_THE_RUN = "use the configuration of the run that wrote it (its config.yaml)"


@dataclass(frozen=True, slots=True)
class Start:
    """Tensors that fit into the model that they were read for."""

    tensors: Mapping[str, Tensor]  # by their names in the model
    source: Path  # where they were read

    def put(self, model: VisionLanguageModel) -> None:
        """Copies them into the model's parameters."""
        put_back({name: model.get_parameter(name) for name in self.tensors}, self.tensors, self.source)


def read_start(shape: VLMConfig, path: Path, base: Sequence[Path]) -> Start:
    """Trained tensors of a run directory, one of its step directories, LaVIN's adapter file, or a LoRA folder. They are
    compared with the model that `shape` describes before the minutes that its base takes to load.

    Args:
        base: the files that the frozen weights come from; a run knows on which ones it was trained.
    Raises:
        CheckpointError: nothing whole is there.
        UsageError: a LoRA for a model that is trained otherwise.
        WeightsError: its tensors are not those that train under this configuration (all listed).
    """
    with torch.device("meta"):
        learns = VisionLanguageModel(shape).trainable()
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there", where="--adapter.init",
            do="name a run directory, a LoRA folder, or one of LaVIN's .pth files",
        )  # fmt: skip
    if is_lora_folder(path):
        return _read_lora(shape, learns, path)
    if path.is_dir():
        step = path if path.name.startswith("step-") else best_or_latest(path)
        if step is None:
            raise CheckpointError(f"{path} has no checkpoint", do="name a run directory that was trained")
        tensors, state = load_checkpoint(step, only=["model"])
        check_identity(state["base"], base)
        start = Start(tensors, step)
    else:
        start = Start(read_lavin_adapters(path, {name: tuple(p.shape) for name, p in learns.items()}), path)
    _check_fits(learns, start.tensors, start.source, OF_THE_RUN)
    return start


def _read_lora(shape: VLMConfig, learns: Mapping[str, Tensor], folder: Path) -> Start:
    """The language model's LoRA, and the tower's where it trains one; a projector beside them has been read with the
    base (engine/sources.py)."""
    if shape.train_language != "lora":
        raise UsageError(
            f"adapter.init {folder} is a LoRA, and the language model trains {shape.train_language}",
            where="--adapter.init", do="--train.language lora",
        )  # fmt: skip
    with_tower = shape.train_vision == "lora"
    found, trained_with = read_peft(folder, shape.language, with_tower=with_tower)
    if (trained_with.alpha, trained_with.rank) != (shape.lora.alpha, shape.lora.rank):
        raise UsageError(
            f"{folder} was trained with an update of {trained_with.alpha:g} / {trained_with.rank} B A, this command "
            f"says {shape.lora.alpha:g} / {shape.lora.rank}",
            where="--lora.alpha and --lora.rank", do="leave both out",
        )  # fmt: skip
    tensors = {f"language.{name}": tensor for name, tensor in found.items()}
    if with_tower:
        tensors |= {f"vision.{name}": tensor for name, tensor in read_peft_tower(folder, shape.vision)[0].items()}
    expected = {name: p for name, p in learns.items() if ".lora." in name}
    _check_fits(expected, tensors, folder, "leave --lora.targets out, or name the model that it was trained on")
    return Start(tensors, folder)


def put_projector(model: VisionLanguageModel, source: ProjectorSource) -> None:
    """Gives the projector the weights that its files hold, and image_newline its value where the model has one."""
    if source.tensors:
        put_back(dict(model.projector.named_parameters()), source.tensors, source.path)
    if source.image_newline is not None and model.image_newline is not None:
        put_back({"image_newline": model.image_newline}, {"image_newline": source.image_newline}, source.path)


@torch.no_grad()
def put_back(trainable: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copies the tensors of `file` into the parameters of the same names.

    Raises:
        WeightsError: names or shapes are not those that train under this configuration (all listed).
    """
    _check_fits(trainable, tensors, file, OF_THE_RUN)
    for name, parameter in trainable.items():
        parameter.copy_(tensors[name])


def _check_fits(trainable: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path, do: str) -> None:
    found, expected = ({name: tuple(t.shape) for name, t in these.items()} for these in (tensors, trainable))
    check_shapes(file, found, expected, do=do)


def best_or_latest(run: Path) -> Path | None:
    """The checkpoint with the best validation loss where a run kept one, else its newest whole one."""
    hint = run / "best"
    if hint.is_file() and (best := run / hint.read_text(encoding="utf-8").strip()).is_dir():
        return best
    return find_latest(run)
