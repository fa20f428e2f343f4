"""Room for <image> in a vocabulary: which id, how many rows, what is in them."""

from __future__ import annotations

import pytest
import torch

from models.weights.write.entries import tensor_entries
from models.weights.write.vocabulary import free_token, padded_vocabulary, with_rows


@pytest.mark.parametrize(
    ("tokens", "rows", "pad", "image", "padded"),
    [
        (32000, 32000, 0, 32000, 32064),  # Vicuna v1.5
        (128256, 128257, 128256, 128257, 128320),  # LLaMA-3 with LLaVA's <pad>
        (128256, 128256, 128256, 128257, 128320),  # the same, where only config.json knows of it
        (128256, 128256, None, 128256, 128320),
        (50295, 51200, 50256, 50295, 51200),  # Phi-2 has rows to spare
        (32011, 32064, 32000, 32011, 32064),  # Phi-3
        (32011, 32011, 32000, 32011, 32064),  # Phi-3, resized by Bunny
        (100289, 100352, None, 100289, 100352),  # StableLM-2
    ],
)
def test_published_vocabularies(tokens: int, rows: int, pad: int | None, image: int, padded: int) -> None:
    assert free_token(tokens, rows, pad) == image
    assert padded_vocabulary(rows, image) == padded


def test_new_rows_are_the_mean_of_the_old_ones() -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    padded = with_rows(tensor_entries({"x": rows})["x"], 8)
    assert padded.shape == (8, 4)
    value = padded.value("x")
    assert torch.equal(value[:5], rows)
    assert torch.equal(value[5:], rows.float().mean(0, keepdim=True).bfloat16().expand(3, 4))
    bias = with_rows(tensor_entries({"x": torch.arange(4.0)})["x"], 5)
    assert torch.equal(bias.value("x"), torch.tensor([0.0, 1.0, 2.0, 3.0, 1.5]))


def test_rows_are_never_cut() -> None:
    with pytest.raises(ValueError, match="5 rows cannot become 4"):
        with_rows(tensor_entries({"x": torch.zeros(5, 2)})["x"], 4)
