from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.weights.errors import WeightsError
from models.weights.language import open_language

Tensors = dict[str, Tensor]
Write = Callable[..., Path]


@pytest.fixture
def delta(language: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(t.shape, generator=generator).half() for name, t in language.items()}


def padded(delta: Tensors, rows: int) -> Tensors:
    wide = ("embed.weight", "head.weight")
    return {name: torch.cat((t, t.new_full((rows, 32), 9.0))) if name in wide else t for name, t in delta.items()}


@pytest.mark.parametrize("layout", ["meta", "meta in two shards", "hf"])
def test_the_delta_is_added_in_the_bases_dtype(
    tmp_path: Path, language: Tensors, delta: Tensors, write_meta: Write, write_hf: Write,
    hf_order: Callable[[Tensors], Tensors], assert_same: Callable[..., None], layout: str,
) -> None:  # fmt: skip
    """`delta` is interleaved; its file is half-split, and comes into the base's order."""
    folder = tmp_path / "base"
    base = write_hf(folder, language) if layout == "hf" else write_meta(folder, language, 1 + ("two" in layout))
    source = open_language(base, write_hf(tmp_path / "delta", hf_order(delta)))
    change = hf_order(delta) if layout == "hf" else delta
    assert_same(source.stream(), {name: t + change[name] for name, t in language.items()})
    assert_same(source.stream(), {name: t + change[name] for name, t in language.items()})  # the base is as it was
    assert source.sizes == {name: 2 * t.nbytes for name, t in language.items()}
    assert source.config == open_language(base).config
    assert {path.parent.name for path in source.files} == {"base", "delta"}


def test_a_delta_in_fp32_is_rounded_to_the_bases_dtype(
    tmp_path: Path, language: Tensors, delta: Tensors, write_meta: Write, write_hf: Write,
    hf_order: Callable[[Tensors], Tensors], assert_same: Callable[..., None],
) -> None:  # fmt: skip
    folder = write_hf(tmp_path / "delta", {name: t.float() for name, t in hf_order(delta).items()})
    source = open_language(write_meta(tmp_path / "base", language), folder)
    assert_same(source.stream(), {name: t + delta[name] for name, t in language.items()})


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_lavins_permutation_adds_half_split_rows_to_interleaved_ones(
    tmp_path: Path, language: Tensors, delta: Tensors, write_meta: Write, write_hf: Write,
    hf_order: Callable[[Tensors], Tensors], assert_same: Callable[..., None], layout: str,
) -> None:  # fmt: skip
    """On a base in Hugging Face's order the sum is the same, in that order."""
    wrong = {name: t + hf_order(delta)[name] for name, t in language.items()}
    if layout == "meta":
        base, expected = write_meta(tmp_path / "base", language), wrong
    else:
        base, expected = write_hf(tmp_path / "base", hf_order(language)), hf_order(wrong)
    source = open_language(base, write_hf(tmp_path / "delta", hf_order(delta)), legacy_permutation=True)
    assert_same(source.stream(), expected)


def test_the_row_of_the_padding_token_is_dropped(
    tmp_path: Path, language: Tensors, delta: Tensors, write_meta: Write, write_hf: Write,
    hf_order: Callable[[Tensors], Tensors], assert_same: Callable[..., None],
) -> None:  # fmt: skip
    folder = write_hf(tmp_path / "delta", padded(hf_order(delta), 1), vocab_size=25)
    source = open_language(write_meta(tmp_path / "base", language), folder)
    assert source.config.vocab_size == 24
    assert_same(source.stream(), {name: t + delta[name] for name, t in language.items()})


def test_more_rows_than_one_are_another_model(
    tmp_path: Path, language: Tensors, delta: Tensors, write_meta: Write, write_hf: Write
) -> None:
    folder = write_hf(tmp_path / "delta", padded(delta, 2), vocab_size=26)
    with pytest.raises(WeightsError, match="delta to another model") as caught:
        open_language(write_meta(tmp_path / "base", language), folder)
    assert caught.value.mismatched == ["vocab_size: got 26, expected 24 or one more"]


def test_a_delta_of_another_size(
    tmp_path: Path, language: Tensors, delta: Tensors, write_meta: Write, write_hf: Write
) -> None:
    first = {name: t for name, t in delta.items() if not name.startswith("layers.1.")}
    folder = write_hf(tmp_path / "delta", first, num_hidden_layers=1)
    with pytest.raises(WeightsError, match="num_layers: got 1, expected 2"):
        open_language(write_meta(tmp_path / "base", language), folder)
