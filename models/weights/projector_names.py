"""Names of projectors in files, after `mm_projector.` (LLaVA, Bunny, Imp) or `multi_modal_projector.` (transformers),
and ours.

    weight, bias                                    linear
    {0,2,...}.{weight,bias}                         mlp{N}x_gelu: a GELU stands at each odd number
    linear_{1,2}.{weight,bias}                      transformers' mlp2x_gelu
    linear_{0,1,2}.{weight,bias}                    Bunny's sppv1, sppv2 and sppv3: the names do not tell them apart
    linear.{weight,bias}                            Bunny's minigpt and vanilla: nor these
    model.mlp.{1,3}., model.mb_block.{1,2}.block.   ldp, as torchvision's InvertedResidual names its parts

Bunny's names are ours too but for ldp's, whose tables are below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from models.projectors.config import GROUPED, MLP, SPP

NUMBERED = re.compile(r"(\d+)\.(weight|bias)")
OURS = re.compile(r"layers\.(\d+)\.(weight|bias)")
HUGGING_FACE = re.compile(r"linear_([12])\.(weight|bias)")

BOTH = ("weight", "bias")
LDP_BLOCK = {
    "0.0": ("depthwise", ("weight",)), "0.1": ("depthwise_norm", BOTH), "1.fc1": ("squeeze", BOTH),
    "1.fc2": ("excite", BOTH), "2.0": ("pointwise", ("weight",)), "2.1": ("pointwise_norm", BOTH),
}  # fmt: skip
LDP = {f"model.mlp.{2 * i - 1}.{leaf}": f"linear_{i}.{leaf}" for i in (1, 2) for leaf in BOTH} | {
    f"model.mb_block.{i}.block.{theirs}.{leaf}": f"block_{i}.{ours}.{leaf}"
    for i in (1, 2)
    for theirs, (ours, leaves) in LDP_BLOCK.items()
    for leaf in leaves
}
SPP_NAMES = [f"linear_{i}.{leaf}" for i in range(3) for leaf in BOTH]
GROUPED_NAMES = [f"linear.{leaf}" for leaf in BOTH]
BUNNY: Mapping[str, Mapping[str, str]] = {  # kind -> their name -> ours
    **{kind: dict(zip(SPP_NAMES, SPP_NAMES, strict=True)) for kind in SPP},
    **{kind: dict(zip(GROUPED_NAMES, GROUPED_NAMES, strict=True)) for kind in GROUPED},
    "ldp": LDP,
}
KNOWN = ("linear", "mlpNx_gelu", "identity", *BUNNY)


def projector_kind(leaves: Iterable[str], said: str = "") -> str:
    """The kind that has tensors of these names; identity where there are none. `said`: what a configuration says, which
    tells kinds with the same names apart.

    Raises:
        ValueError: names of another projector, or of several kinds of which none is `said`.
    """
    found = set(leaves)
    if not found:
        return "identity"
    if found == {"weight", "bias"}:
        return "linear"
    fitting = [kind for kind, names in BUNNY.items() if found == names.keys()]
    if len(fitting) > 1 and said not in fitting:
        raise ValueError(
            f"a projector of {', '.join(sorted(found))} may be {' or '.join(fitting)}: say which as mm_projector_type "
            "in the config.json beside it"
        )
    if fitting:
        return said if said in fitting else fitting[0]
    for numbers in (NUMBERED, HUGGING_FACE):
        matches = [numbers.fullmatch(leaf) for leaf in found]
        held = sorted({int(match[1]) for match in matches if match})
        expected = list(range(0, 2 * len(held), 2)) if numbers is NUMBERED else [1, 2]
        if all(matches) and held == expected and len(found) == 2 * len(held):
            return f"mlp{len(held)}x_gelu"
    raise ValueError(f"a projector of {', '.join(sorted(found)[:8])} is of no kind that is known: {', '.join(KNOWN)}")


def our_projector_name(leaf: str, kind: str) -> str:
    """`2.weight` (LLaVA's) and `linear_2.weight` (transformers') -> `layers.1.weight`; `weight` -> `layers.0.weight`.

    Raises:
        ValueError: the name has no place in this kind.
    """
    if kind == "linear" and leaf in ("weight", "bias"):
        return f"layers.0.{leaf}"
    if leaf in BUNNY.get(kind, {}):
        return BUNNY[kind][leaf]
    if MLP.fullmatch(kind) and (match := NUMBERED.fullmatch(leaf)):
        return f"layers.{int(match[1]) // 2}.{match[2]}"
    if kind == "mlp2x_gelu" and (match := HUGGING_FACE.fullmatch(leaf)):
        return f"layers.{int(match[1]) - 1}.{match[2]}"
    raise ValueError(f"{leaf} is no tensor of a projector of kind {kind}")


def their_projector_name(name: str, kind: str) -> str:
    """`layers.1.weight` -> `2.weight` (mlp), `layers.0.weight` -> `weight` (linear): what follows `mm_projector.`

    Raises:
        ValueError: the layout of LLaVA and Bunny has no place for it.
    """
    match = OURS.fullmatch(name)
    if match and kind == "linear" and match[1] == "0":
        return match[2]
    if match and MLP.fullmatch(kind):
        return f"{2 * int(match[1])}.{match[2]}"
    for theirs, ours in BUNNY.get(kind, {}).items():
        if name == ours:
            return theirs
    raise ValueError(f"{name} of a projector of kind {kind} has no name in LLaVA's layout")
