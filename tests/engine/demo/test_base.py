"""The shipped base: small, in the layouts of the real weights, and what its files say it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.data.tokenizer import open_tokenizer
from engine.demo import base, cache
from engine.errors import DataError
from models.weights.language import open_language
from models.weights.towers import open_vision


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base.unpack_base(folder)
    return folder


def test_it_is_at_most_a_megabyte() -> None:
    assert cache.BASE_WEIGHTS.stat().st_size + cache.BASE_TOKENIZER.stat().st_size <= 1_000_000


def test_it_is_read_like_real_weights(unpacked: Path) -> None:
    language, vision = open_language(unpacked), open_vision(unpacked / "tower")
    assert language.config == base.LANGUAGE and vision.config == base.VISION
    tokenizer = open_tokenizer(unpacked / "tokenizer.model")
    tokenizer.require_vocab(language.config.vocab_size)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode("The answer is A. \u00e4\n")) == "The answer is A. \u00e4\n"
    with pytest.raises(DataError):
        tokenizer.require_vocab(32000)


def test_unpacking_keeps_every_number(unpacked: Path) -> None:
    tensors = dict(open_language(unpacked).stream())
    fresh = base.fresh_base(base.LANGUAGE, base.VISION, seed=0)
    assert {f"language.{name}" for name in tensors} == {name for name in fresh if name.startswith("language.")}
    assert all(tensor.dtype == torch.float16 and torch.isfinite(tensor).all() for tensor in tensors.values())


def test_the_cache_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path))
    first = cache.demo_base()
    made = (first / "consolidated.00.pth").stat().st_mtime_ns
    assert cache.demo_base() == first and (first / "consolidated.00.pth").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [first.name]  # nothing temporary is left
