from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights.errors import WeightsError
from models.weights.language import open_language

Tensors = dict[str, Tensor]
Write = Callable[..., Path]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_shards_gives_the_whole(
    tmp_path: Path, language: Tensors, write_meta: Write, assert_same: Callable[..., None], count: int
) -> None:
    source = open_language(write_meta(tmp_path, language, count))
    assert source.config == LlamaConfig(
        vocab_size=24, dim=32, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=48, norm_eps=1e-6
    )
    assert [path.name for path in source.files] == ["params.json", *(f"consolidated.{i:02d}.pth" for i in range(count))]
    assert_same(source.stream(), language)
    assert_same(source.stream(), language)  # and again


@pytest.mark.parametrize(
    "params",
    [
        {"vocab_size": 24},
        {"n_kv_heads": 4},
        {"n_kv_heads": None, "rope_theta": 10000, "ffn_dim_multiplier": 1.3, "max_seq_len": 2048},
        {"use_scaled_rope": False},
    ],
)
def test_keys_that_change_nothing_are_accepted(
    tmp_path: Path, language: Tensors, write_meta: Write, params: dict[str, object]
) -> None:
    plain = open_language(write_meta(tmp_path, language)).config
    assert open_language(write_meta(tmp_path, language, **params)).config == plain


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
        ({"n_kv_heads": 8}, "n_kv_heads is 8"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"use_scaled_rope": True}, "use_scaled_rope true .* not supported"),
        ({"moe": {}}, "moe not supported"),
        ({"dim": "32"}, "dim is '32'"),
        ({"dim": 10**9}, "dim is 1000000000"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_heads": 5}, "dim 32 is not an even head width"),
        ({"norm_eps": None}, "norm_eps is None"),
        ({"norm_eps": -1}, "norm_eps is -1"),
    ],
)
def test_params_of_another_architecture_name_the_key(
    tmp_path: Path, language: Tensors, write_meta: Write, params: dict[str, object], message: str
) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        open_language(write_meta(tmp_path, language, **params))
    assert caught.value.file == str(tmp_path / "params.json")


def narrow_kv(language: Tensors) -> Tensors:
    """Two key/value heads of four."""
    kv = ("attention.k.weight", "attention.v.weight")
    return {name: tensor[:16] if name.endswith(kv) else tensor for name, tensor in language.items()}


@pytest.mark.parametrize("count", [1, 2])
def test_grouped_queries_and_another_theta_as_in_llama_2_70b(
    tmp_path: Path, language: Tensors, write_meta: Write, assert_same: Callable[..., None], count: int
) -> None:
    tensors = narrow_kv(language)
    folder = write_meta(tmp_path, tensors, count, n_kv_heads=2, rope_theta=500000.0, ffn_dim_multiplier=1.3)
    source = open_language(folder)
    assert (source.config.num_kv_heads, source.config.rope_theta) == (2, 500000.0)
    assert source.config.rope_interleaved
    assert_same(source.stream(), tensors)


def test_an_embedding_that_is_split_over_its_rows_as_in_llama_3(
    tmp_path: Path, language: Tensors, write_meta: Write, assert_same: Callable[..., None]
) -> None:
    folder = write_meta(tmp_path, language, 2)
    for path, rows in zip(sorted(folder.glob("*.pth")), language["embed.weight"].chunk(2), strict=True):
        torch.save(torch.load(path) | {"tok_embeddings.weight": rows.clone()}, path)
    assert_same(open_language(folder).stream(), language)


def test_more_shards_than_groups(tmp_path: Path, language: Tensors, write_meta: Write) -> None:
    folder = write_meta(tmp_path, narrow_kv(language), 4, n_kv_heads=2)
    with pytest.raises(WeightsError, match="n_kv_heads 2 does not divide n_heads 4, or into 4 shards"):
        open_language(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"dim": NaN}', "[" * 100_000, b"\xff"])
def test_params_that_are_no_json_object(
    tmp_path: Path, language: Tensors, write_meta: Write, text: str | bytes
) -> None:
    path = write_meta(tmp_path, language) / "params.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeightsError, match=r"JSON|expected an object"):
        open_language(tmp_path)


@pytest.mark.parametrize(("gone", "message"), [(0, "consolidated.00.pth is not there"), (1, "copy all 2 consolidated")])
def test_a_missing_shard_is_noticed(
    tmp_path: Path, language: Tensors, write_meta: Write, gone: int, message: str
) -> None:
    (write_meta(tmp_path, language, 2) / f"consolidated.{gone:02d}.pth").unlink()
    with pytest.raises(WeightsError, match=message):
        open_language(tmp_path)


def test_no_shard_at_all(tmp_path: Path, language: Tensors, write_meta: Write) -> None:
    (write_meta(tmp_path, language) / "consolidated.00.pth").unlink()
    with pytest.raises(WeightsError, match="no consolidated"):
        open_language(tmp_path)


def test_every_difference_is_listed(tmp_path: Path, language: Tensors, write_meta: Write) -> None:
    path = write_meta(tmp_path, language, 2) / "consolidated.01.pth"
    shard = torch.load(path, weights_only=True)
    del shard["layers.1.ffn_norm.weight"]
    shard["layers.2.attention.wq.weight"] = torch.ones(2)
    shard["layers.0.feed_forward.w2.weight"] = torch.ones(32, 48)
    torch.save(shard, path)
    with pytest.raises(WeightsError) as caught:
        open_language(tmp_path)
    assert caught.value.file == str(path)
    assert caught.value.missing == ["layers.1.ffn_norm.weight"]
    assert caught.value.extra == ["layers.2.attention.wq.weight"]
    assert caught.value.mismatched == ["layers.0.feed_forward.w2.weight: got 32x48, expected 32x24"]


def test_a_vocabulary_that_is_not_that_of_the_tensors(tmp_path: Path, language: Tensors, write_meta: Write) -> None:
    with pytest.raises(WeightsError) as caught:
        open_language(write_meta(tmp_path, language, vocab_size=25))
    assert caught.value.mismatched[0] == "tok_embeddings.weight: got 24x32, expected 25x32"


def test_a_folder_of_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither params\.json"):
        open_language(tmp_path)


def test_a_stream_keeps_no_more_than_it_yields(tmp_path: Path, language: Tensors, write_meta: Write) -> None:
    """One shard: views of the mapped file. Two: the merged tensor is the caller's alone."""
    source = open_language(write_meta(tmp_path, language, 2))
    first, second = source.fetch("embed.weight"), source.fetch("embed.weight")
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    single = open_language(write_meta(tmp_path / "single", language))
    first, second = single.fetch("embed.weight"), single.fetch("embed.weight")
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("count", [1, 2])
def test_sizes_are_the_bytes_that_are_read(tmp_path: Path, language: Tensors, write_meta: Write, count: int) -> None:
    sizes = open_language(write_meta(tmp_path, language, count)).sizes
    assert sizes == {name: tensor.nbytes for name, tensor in language.items()}
