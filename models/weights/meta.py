"""LLaMA in Meta's layout: params.json and consolidated.00.pth, .01.pth, ... (one file a model-parallel rank).

Each file holds a slice of every matrix. Column-parallel ones are split over their rows, row-parallel ones over their
columns, norms are whole in every file. The embedding is split over its columns in LLaMA-1 and 2, over its rows in
LLaMA-3. q and k are interleaved: RoPE turns channels 2i and 2i + 1 of a head together.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.language.llama import LlamaConfig
from models.weights.archive import Archive, Reopened, Shape, open_archive
from models.weights.errors import WeightsError
from models.weights.names import Names, check_shapes, language_shapes
from models.weights.settings import MOST_LAYERS, MOST_VOCABULARY, MOST_WIDTH, Settings, read_settings
from models.weights.source import LanguageSource

NAMES = Names(
    outside={"embed.weight": "tok_embeddings.weight", "norm.weight": "norm.weight", "head.weight": "output.weight"},
    layer="layers.{}.",
    modules={
        "attention_norm": "attention_norm", "attention.q": "attention.wq", "attention.k": "attention.wk",
        "attention.v": "attention.wv", "attention.o": "attention.wo", "mlp_norm": "ffn_norm",
        "mlp.gate": "feed_forward.w1", "mlp.down": "feed_forward.w2", "mlp.up": "feed_forward.w3",
    },
)  # fmt: skip
IGNORED = ("rope.freqs",)  # a table that follows from the configuration

EMBEDDING = "embed.weight"
SPLIT_COLUMNS = ("attention.o.weight", "mlp.down.weight")
WHOLE = "norm.weight"  # attention_norm, mlp_norm and the last norm end in it

KNOWN_KEYS = {
    "dim", "n_layers", "n_heads", "norm_eps", "vocab_size",
    "n_kv_heads", "rope_theta", "use_scaled_rope",
    "multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len",  # of no effect: the MLP's width is in a shape
}  # fmt: skip


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's layout. Where the same model stands beside it in Hugging Face's, shards decide."""
    return (folder / "params.json").exists() and (
        not (folder / "config.json").exists() or any(folder.glob("consolidated.*.pth"))
    )


def open_meta(folder: Path) -> LanguageSource:
    """LLaMA-1, 2 and 3 from `folder`.

    Raises:
        WeightsError: a file is missing, damaged or does not fit the others, params.json has a key or a value of another
            architecture, or tensors are missing, unknown or of another shape (all listed).
    """
    params = read_settings(folder / "params.json")
    paths = _shard_paths(folder)
    shards = [Reopened(partial(open_archive, path)) for path in paths]
    config = _config(params, shards[0](), len(shards))
    expected = language_shapes(config)
    axes = {name: _split_axis(name, config, shards[0]()) for name in expected}
    local = {NAMES.of(name): _local(shape, axes[name], len(shards)) for name, shape in expected.items()}
    for shard in shards:
        check_shapes(shard().path, {n: s for n, s in shard().shapes.items() if n not in IGNORED}, local)

    def holding(name: str) -> list[Archive]:
        """The shards that are read for this tensor."""
        return [shard() for shard in (shards[:1] if axes[name] is None else shards)]

    def allocated(name: str) -> bool:
        return len(shards) > 1 and axes[name] is not None

    def fetch(name: str) -> Tensor:
        parts = [shard.fetch(NAMES.of(name)) for shard in holding(name)]
        axis = axes[name]
        return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)

    def release(name: str) -> None:
        for shard in holding(name):
            shard.release(NAMES.of(name))

    def close() -> None:
        for shard in shards:
            shard.close()

    return LanguageSource(
        config=config, files=(params.path, *paths), names=tuple(expected),
        sizes={name: sum(shard.sizes[NAMES.of(name)] for shard in holding(name)) for name in expected},
        fetch=fetch, release=release, close=close, allocated=allocated,
    )  # fmt: skip


def _shard_paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise WeightsError(folder, "has params.json but no consolidated.00.pth", do="put Meta's .pth files beside it")
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    gone = [name for name in expected if not (folder / name).exists()]
    if gone:
        raise WeightsError(folder, f"{gone[0]} is not there, though {paths[-1].name} is", do="copy all shards")
    return paths


def _config(params: Settings, first: Archive, shards: int) -> LlamaConfig:
    dim = params.integer("dim", most=MOST_WIDTH)
    heads = params.integer("n_heads", most=dim)
    kv_heads = params.integer("n_kv_heads", most=heads, default=heads)
    unknown = sorted(set(params.values) - KNOWN_KEYS)
    if unknown:
        raise WeightsError(params.path, f"{', '.join(unknown)} not supported; nibble reads LLaMA-1, 2 and 3")
    if params.flag("use_scaled_rope"):
        raise WeightsError(params.path, "use_scaled_rope true (LLaMA-3.1 and newer) is not supported; LLaMA-3 is")
    if dim % (2 * heads):
        raise WeightsError(params.path, f"dim {dim} is not an even head width times n_heads {heads}")
    held = _rows(first, "layers.0.attention.q.weight")
    if held * shards != dim:
        raise WeightsError(
            params.path.parent, f"{shards} shards with {held} rows of q each do not make {dim}",
            do=f"copy all {dim // held} consolidated.*.pth files" if held and dim % held == 0 else "",
        )  # fmt: skip
    if heads % kv_heads or kv_heads % shards:
        raise WeightsError(
            params.path, f"n_kv_heads {kv_heads} does not divide n_heads {heads}, or into {shards} shards"
        )
    vocabulary = params.integer("vocab_size", most=MOST_VOCABULARY, default=-1, least=-1)
    return LlamaConfig(
        vocab_size=vocabulary if vocabulary > 0 else _rows(first, "head.weight") * shards,
        dim=dim,
        num_layers=params.integer("n_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_dim=_rows(first, "layers.0.mlp.gate.weight") * shards,
        norm_eps=params.real("norm_eps"),
        rope_theta=params.real("rope_theta", default=10000.0),
        rope_interleaved=True,
    )


def _rows(shard: Archive, name: str) -> int:
    shape = shard.shapes.get(NAMES.of(name))
    if not shape:
        raise WeightsError(shard.path, missing=[NAMES.of(name)])
    return shape[0]


def _split_axis(name: str, config: LlamaConfig, shard: Archive) -> int | None:
    if name.endswith(WHOLE):
        return None
    if name == EMBEDDING:
        columns = shard.shapes.get(NAMES.of(name), ())[-1:]
        return 0 if columns == (config.dim,) else 1
    return 1 if name.endswith(SPLIT_COLUMNS) else 0


def _local(shape: Shape, axis: int | None, shards: int) -> Shape:
    """The slice of a tensor that each of `shards` files holds."""
    return tuple(size // shards if i == axis else size for i, size in enumerate(shape))
