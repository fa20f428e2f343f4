"""The validation loss: the mean cross-entropy of a data set's supervised tokens, the same on any number of ranks."""

from __future__ import annotations

import torch

from engine.data.images import TileReader
from engine.data.packing import collate, form_of, plan_packs
from engine.data.sample import IGNORE, Dataset
from engine.distributed import Ranks
from models.vlm import VisionLanguageModel

WINDOW = 64  # samples that are laid out and packed at a time


@torch.no_grad()
def validation_loss(
    model: VisionLanguageModel, dataset: Dataset, reader: TileReader, ranks: Ranks, *,
    tokens_per_batch: int, device: torch.device,
) -> float:  # fmt: skip
    """Mean over tokens, without dropout; a model in training mode is back in it afterwards.

    Each rank takes every `world`-th window of samples.
    """
    was_training, form = model.training, form_of(model.config)
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, of tokens
    for start in range(ranks.rank * WINDOW, len(dataset), ranks.world * WINDOW):
        indices = range(start, min(start + WINDOW, len(dataset)))
        samples = [dataset.sample(i) for i in indices]
        lengths, shown = [len(s.input_ids) for s in samples], [s.tiles for s in samples]
        for members in plan_packs(lengths, tokens_per_batch, tiles=shown, modality=form.modality):
            chosen = [samples[m] for m in members]
            tiles = [
                None if s.image is None else reader.tile(s.image, dataset.where(indices[m]))
                for m, s in zip(members, chosen, strict=True)
            ]
            ones = [(torch.tensor(s.labels) != IGNORE).float() for s in chosen]
            sums[0] += model(collate(chosen, ones, tiles, form=form).to(device)).item()
            sums[1] += sum(float(weight.sum()) for weight in ones)
    model.train(was_training)
    loss, tokens = ranks.sum(sums.to(device, torch.float32)).tolist()
    return loss / max(tokens, 1.0)
