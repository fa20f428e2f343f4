"""What LLaVA, Bunny and Imp leave beside a base model: mm_projector.bin, non_lora_trainables.bin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.weights.lora_files import WRAPPER
from models.weights.whole import whole
from models.weights.write.entries import Entries

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"


def write_projector_file(folder: Path, entries: Entries) -> Path:
    """mm_projector.bin of entries under LLaVA's names (`model.mm_projector.0.weight`, `model.image_newline`)."""
    return _write(folder / PROJECTOR_FILE, {name: entry.value(name) for name, entry in entries.items()})


def write_non_lora(folder: Path, entries: Entries) -> Path:
    """non_lora_trainables.bin: what was trained beside a LoRA, under LLaVA's names as PEFT wraps them."""
    return _write(folder / NON_LORA_FILE, {WRAPPER + name: entry.value(name) for name, entry in entries.items()})


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A torch file of tensors alone, each a copy: a view would take its whole storage into the file."""
    content = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with whole(path) as temporary, temporary.open("wb") as file:  # given a path, torch writes its name into the file
        torch.save(content, file)
    return path
