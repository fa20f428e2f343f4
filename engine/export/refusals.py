"""What formats cannot say of a model: MMA adapters, LaVIN's projector, weights that are quantized in their files."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.errors import UsageError
from engine.export.origin import Origin
from models.weights.source import LanguageSource
from models.weights.write.entries import NOT_QUANTIZED

TO_LAVIN = "--to lavin writes its adapters as LaVIN's own eval.py and demo.py read them"
KEEP = "no other project has this model: chat.py and eval.py read the run itself"


def require_llava_projector(origin: Origin) -> None:
    """Checks that tower and language model are joined as LLaVA, Bunny and Imp can say it.

    Raises:
        UsageError: by LaVIN's projector, or its class tokens.
    """
    assert origin.settings is not None and origin.vision is not None
    kind, feature = origin.settings.projector, origin.vision.config.select_feature
    if kind == "lavin" or feature == "class_tokens":
        raise UsageError(
            f"{origin.name} has a {kind} projector of {feature}", where="--to",
            why="LLaVA, Bunny, Imp and transformers have other projectors, of patches",
            do=KEEP if why_not_lavin(origin) else TO_LAVIN,
        )  # fmt: skip


def why_not_lavin(origin: Origin) -> str:
    """What keeps this model out of LaVIN's format; empty where nothing does."""
    if origin.mma is None:
        return "it has no MMA adapters"
    assert origin.settings is not None and origin.vision is not None  # MMA comes from runs, which have both
    language, vision = origin.language.config.family, origin.vision.config
    if (language, vision.family, vision.select_feature) != ("llama", "clip", "class_tokens"):
        return f"LaVIN has LLaMA and CLIP's class tokens, not {language} and {vision.family}'s {vision.select_feature}"
    projector = origin.settings.projector
    return "" if projector == "lavin" else f"LaVIN has a projector of its own, not {projector}"


def require_no_mma(origin: Origin, parts: Sequence[str]) -> None:
    """Checks that `parts` (language, vision) have no MMA adapters.

    Raises:
        UsageError: they have.
    """
    adapted = [] if origin.mma is None else [part for part in parts if any(
        name.startswith(f"{part}.") and "_adapter." in name for name in origin.mma.tensors
    )]  # fmt: skip
    if adapted:
        raise UsageError(
            f"{origin.name} has MMA adapters in its {' and '.join(adapted)}", where="--to",
            why="a router mixes them token by token: they cannot be added to weights, and no other format knows them",
            do=KEEP if why_not_lavin(origin) else TO_LAVIN,
        )  # fmt: skip


def require_not_quantized(language: LanguageSource) -> None:
    """A look at the first layer and the head: formats quantize all linears or none.

    Raises:
        UsageError: they are quantized.
    """
    looked = [name for name in language.names if name.startswith(("layers.0.", "head.")) and name.endswith("weight")]
    if any(not isinstance(language.fetch(name), Tensor) for name in looked):
        raise UsageError(
            f"the weights in {language.files[0].parent} are quantized", where="the base's files", do=NOT_QUANTIZED
        )
