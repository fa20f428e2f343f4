"""A vocabulary with room for the token <image>, as transformers' LLaVA models have it.

The embedding and the head get rows up to a multiple of 64. A new row is the mean of the rows that were there, taken in
fp32: of a word that no text has taught, nothing better is known, and a logit that is the mean of all others is never
the largest. Nothing is drawn, so an export is the same every time. (LLaVA's own converter draws the new rows around
that mean, with a variance of 1e-5 of the rows'.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.weights.write.entries import Entry, changed

MULTIPLE = 64


def padded_vocabulary(rows: int, image_token: int) -> int:
    """Rows of the embedding of a vocabulary of `rows` with a token of id `image_token`."""
    needed = max(rows, image_token + 1)
    return -(-needed // MULTIPLE) * MULTIPLE


def free_token(next_free: int, vocab_size: int, pad_token: int | None) -> int:
    """The id of the next new token: behind the tokenizer's, behind the padding token's, and behind a vocabulary that
    was resized to its tokenizer (which then is no multiple of 64).

    LLaMA-3's tokenizer ends at 128255 and LLaVA gives 128256 to <pad>, so that 128257 is free.
    """
    resized = vocab_size if vocab_size % MULTIPLE else 0
    return max(next_free, resized, 0 if pad_token is None else pad_token + 1)


def with_rows(entry: Entry, rows: int) -> Entry:
    """An embedding [V, D] or head bias [V] with `rows` rows, the new ones their mean.

    Raises:
        ValueError: it has more.
    """
    if rows < entry.shape[0]:
        raise ValueError(f"{entry.shape[0]} rows cannot become {rows}")
    return entry if rows == entry.shape[0] else changed(entry, lambda t: _padded(t, rows), (rows, *entry.shape[1:]))


def _padded(tensor: Tensor, rows: int) -> Tensor:
    mean = tensor.to(torch.float32).mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(rows - tensor.shape[0], *tensor.shape[1:])))
