"""LoRA as PEFT writes it: adapter_config.json and adapter_model.safetensors or .bin.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [r, in]     (also .lora_A.default.weight)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    [out, r]

PEFT's base is a model of transformers, whose q and k are half-split. Where ours are interleaved, the rows of their B
change places: (P B) A = P (B A).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.language.config import DecoderConfig
from models.vision.tower import TowerConfig
from models.weights.archive import Shape
from models.weights.errors import WeightsError
from models.weights.hf_files import HfTensors
from models.weights.lora_settings import CONFIG_NAME, check_targets, lora_config_of, peft_settings
from models.weights.lora_sites import SIDES, Site, language_linears, language_sites, linear_of, tower_sites
from models.weights.names import check_shapes
from models.weights.rope_order import is_rotated, to_half_split, to_interleaved
from models.weights.settings import read_settings
from models.weights.split import split
from models.weights.towers.open import export_layout
from models.weights.view import Renamed, Tensors
from models.weights.whole import whole

WRAPPER = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT = re.compile(r"\.lora_([AB])\.default\.weight$")


class TowerLoRAError(WeightsError):
    """A LoRA that changes the vision tower too, where nobody asked for that."""


def read_peft(
    folder: str | Path, config: DecoderConfig, *, with_tower: bool = False
) -> tuple[dict[str, Tensor], LoRAConfig]:
    """The LoRA on the language model `config` in `folder`, in memory, and its settings.

    Args:
        with_tower: one on the vision tower too is no error; `read_peft_tower` reads it.

    Returns:
        tensors by our names within the language model (`layers.0.attention.q.lora.a` [r, in], `.b` [out, r]), in the
        file's dtype, q and k in the order of `config`.

    Raises:
        WeightsError: a setting that we do not compute, a damaged file, or tensors that are missing, unknown or of
            another shape (all listed).
    """
    folder = Path(folder)
    parts = split(_tensors(folder))
    if parts.tower.shapes and not with_tower:
        raise TowerLoRAError(
            folder, f"also changes the vision tower: {len(parts.tower.shapes)} tensors of its LoRA, such as "
            f"{next(iter(parts.tower.shapes))}. LLaVA's training does that by accident where the tower is built first "
            "(pull request 1347)",
        )  # fmt: skip
    if parts.projector.shapes:
        raise WeightsError(
            folder, "has LoRA on the projector; here it is trained whole", extra=[*parts.projector.shapes]
        )
    tensors, lora = _read(folder, parts.language, language_sites(config, parts.language.shapes))
    if config.rope_interleaved:
        for name in filter(is_rotated, tensors):
            tensors[name] = to_interleaved(tensors[name], config.head_dim, config.rotary_dim)
    return tensors, lora


def read_peft_tower(folder: str | Path, config: TowerConfig) -> tuple[dict[str, Tensor], LoRAConfig]:
    """The LoRA on the vision tower `config` in `folder`, by our names within the tower. That of blocks that are not run
    is left out.

    Raises:
        WeightsError: as `read_peft`.
    """
    tensors = split(_tensors(Path(folder))).tower
    layout = export_layout(config)
    prefix = layout.prefix if any(name.startswith(layout.prefix) for name in tensors.shapes) else ""
    inner = {
        n.removeprefix(prefix): n for n in tensors.shapes if not _is_behind(n, prefix + layout.names.layer, config)
    }
    return _read(Path(folder), Renamed(tensors, inner), tower_sites(config, layout.names))


def write_peft(
    folder: str | Path, tensors: Mapping[str, Tensor], config: DecoderConfig, lora: LoRAConfig, *, base: str = "",
) -> None:  # fmt: skip
    """Writes `tensors` (our names within the language model, as `read_peft` gives them) so that PEFT loads them onto
    the model called `base`, in their dtype. Each file is whole or absent.

    Raises:
        WeightsError: they are not the LoRA that `config` and `lora` describe (all differences listed).
    """
    folder = Path(folder)
    sites = [site for site in language_sites(config) if not lora.targets or linear_of(site.name) in lora.targets]
    expected = {f"{site.name}.lora.{side}": shape for site in sites
                for side, shape in zip(SIDES, site.expected(lora.rank).values(), strict=True)}  # fmt: skip
    check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    content = {
        f"{WRAPPER}{site.theirs}.{theirs}.weight": _as_theirs(f"{site.name}.lora.{side}", tensors, config)
        for site in sites for side, theirs in SIDES.items()
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / FILES[0]) as path:
        save_file(content, path, metadata={"format": "pt"})
    settings = peft_settings(lora, [site.theirs for site in sites], base)
    with whole(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def peft_names(config: DecoderConfig) -> dict[str, str]:
    """PEFT's name of each linear in a block: {"attention.q": "self_attn.q_proj", ...}."""
    return language_linears(config)


def _as_theirs(name: str, tensors: Mapping[str, Tensor], config: DecoderConfig) -> Tensor:
    """An own tensor on the host: no view of a larger one, and q and k as transformers has them."""
    tensor = tensors[name].detach().to("cpu")
    if config.rope_interleaved and is_rotated(name):
        return to_half_split(tensor, config.head_dim, config.rotary_dim)
    return tensor.contiguous()


def _tensors(folder: Path) -> Tensors:
    """The adapter's tensors without PEFT's wrapper and with today's spelling."""
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise WeightsError(folder, f"has neither {' nor '.join(FILES)}", do="name the folder that PEFT wrote")
    tensors = HfTensors([path])
    names = {DEFAULT.sub(r".lora_\1.weight", name.removeprefix(WRAPPER)): name for name in tensors.shapes}
    if len(names) != len(tensors.shapes):
        raise WeightsError(path, "holds tensors both with and without '.default'")
    return Renamed(tensors, names)


def _read(folder: Path, tensors: Tensors, sites: list[Site]) -> tuple[dict[str, Tensor], LoRAConfig]:
    settings = read_settings(folder / CONFIG_NAME)
    begun = {linear_of(site.name) for site in sites if any(name in tensors.shapes for name in site.expected(1))}
    lora = lora_config_of(settings, [name for name in dict.fromkeys(linear_of(s.name) for s in sites) if name in begun])
    held = [site for site in sites if linear_of(site.name) in begun]
    expected: dict[str, Shape] = {}
    for site in held:
        expected |= site.expected(lora.rank)
    check_shapes(folder, tensors.shapes, expected, do=f"name the model it was trained on ({CONFIG_NAME} says which)")
    if not held:
        raise WeightsError(folder, "holds no LoRA on the linears of this model's blocks")
    check_targets(settings, [site.theirs for site in sites], [site.theirs for site in held])
    found: dict[str, Tensor] = {}
    for site in held:
        found |= site.read(tensors)
    tensors.close()
    return found, lora


def _is_behind(name: str, layer: str, config: TowerConfig) -> bool:
    start, _, _ = layer.partition("{}")
    number = name.removeprefix(start).partition(".")[0]
    return name.startswith(start) and number.isdigit() and config.layers_run <= int(number) < config.num_layers
