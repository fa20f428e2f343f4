"""The language model's weights, whichever family and layout they are in, alone or within a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from models.language.config import DecoderConfig
from models.quantized import Packed
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.families.registry import family_of
from models.weights.hf_files import open_folder
from models.weights.meta import is_meta, open_meta
from models.weights.names import Names, check_shapes, language_shapes
from models.weights.prequantized import Prequantized, check_quantization, take
from models.weights.settings import Settings, read_settings
from models.weights.source import LanguageSource
from models.weights.split import Parts, split, text_settings
from models.weights.vicuna import add_delta
from models.weights.view import Tensors

__all__ = ["LanguageSource", "open_decoder", "open_language", "open_parts"]

HEAD = "head.weight"
IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # follow from the settings


def open_language(folder: str | Path, delta: str | Path = "", *, legacy_permutation: bool = False) -> LanguageSource:
    """The language model in `folder`: Meta's layout if it holds params.json, else that of config.json, whose model may
    be a vision-language model.

    `delta` names a Vicuna delta to add; `legacy_permutation` adds it as LaVIN did, see `add_delta`.

    Raises:
        WeightsError: neither layout is there, config.json describes what we do not compute, or tensors are missing,
            unknown or of another shape (all listed).
    """
    folder = Path(folder)
    if is_meta(folder):
        source = open_meta(folder)
    elif (folder / "config.json").exists():
        source = _open_folder(folder)
    else:
        raise WeightsError(
            folder, "holds neither params.json (Meta's layout) nor config.json (Hugging Face's)",
            do="name the folder itself, such as weights/7B",
        )  # fmt: skip
    if not delta:
        return source
    return add_delta(source, _open_folder(Path(delta)), Path(delta), legacy_permutation=legacy_permutation)


def _open_folder(folder: Path) -> LanguageSource:
    return open_parts(folder, read_settings(folder / "config.json"))[0]


def open_parts(folder: Path, settings: Settings) -> tuple[LanguageSource, Parts]:
    """The language model in `folder`, whose config.json is `settings`, and every part that its files hold.

    Raises:
        WeightsError: as `open_language`.
    """
    check_quantization(settings)
    parts = split(open_folder(folder))
    with parts.language.errors_by_names_there():
        return open_decoder(folder, parts.language, text_settings(settings)), parts


def open_decoder(where: Path, tensors: Tensors, settings: Settings) -> LanguageSource:
    """The language model of `tensors`, which are a language model's alone; `settings` describes it, and `where` is
    named in errors.

    Raises:
        WeightsError: as `open_language`.
    """
    packed = Prequantized(tensors)
    found = {name: shape for name, shape in packed.shapes.items() if not name.endswith(IGNORED)}
    family = family_of(settings, found)
    config = family.config_of(settings)
    names = (family.layout_in(found) or family.layouts[0]).names(config)
    config = _as_found(config, names, found)
    shapes = language_shapes(config)
    tied = settings.flag("tie_word_embeddings") and names.of(HEAD) not in found
    held = {name: shape for name, shape in shapes.items() if not (tied and name == HEAD)}
    check_shapes(where, found, names.expected(held))
    named = _Named(packed, names, tied, where)
    order = {name: i for i, name in enumerate(found)}
    ours = tuple(sorted(shapes, key=lambda name: order[named.theirs(name)]))
    return LanguageSource(
        config=config, files=(settings.path, *tensors.files), names=ours, sizes={n: named.size(n) for n in ours},
        fetch=named.fetch, release=named.release, close=packed.close, allocated=named.is_copy,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Named:
    """Tensors by our names."""

    tensors: Prequantized
    names: Names
    tied: bool  # the head is the embedding
    where: Path

    def theirs(self, name: str) -> str:
        return self.names.of("embed.weight" if self.tied and name == HEAD else name)

    def size(self, name: str) -> int:
        part = self.names.part(name)
        return self.tensors.sizes[self.theirs(name)] // (1 if part is None else part.count)

    def is_copy(self, name: str) -> bool:
        part = self.names.part(name)
        return part is not None and part.head_dim is not None

    def fetch(self, name: str) -> Tensor | Packed:
        theirs = self.theirs(name)
        return take(self.tensors.fetch(theirs), self.names.part(name), theirs, self.where)

    def release(self, name: str) -> None:
        self.tensors.release(self.theirs(name))


def _as_found(config: DecoderConfig, names: Names, found: Mapping[str, Shape]) -> DecoderConfig:
    """`config` with what only the tensors say: rows of a vocabulary that was enlarged or shrunk after config.json was
    written, and whether Phi's head has a bias."""
    rows = found.get(names.of("embed.weight"))
    if rows and len(rows) == 2:
        config = replace(config, vocab_size=rows[0])
    return replace(config, head_bias=names.of("head.bias") in found) if config.head_bias else config
